"""How good Booster's approximation is along the training: its gradient against the exact one, its predicted step
against the real one.

  python -m experiments.approximation --run_dir=runs/approximation --seeds=0,1,2

Booster's regularizer is R(w) = h(w) − h(w − alpha g / ‖g‖), g = ∇h(w). Its paper (arXiv 2409.01586, eq. 3-4) takes
∇h(w) − ∇h(w') for ∇R, which leaves out how the step's direction depends on w. Measured on a fixed harmful batch and a
fixed alignment batch: the angle between the two gradients and the ratio of their norms, of the regularizer alone and
of the whole gradient ∇f + lam ∇R; and R beside alpha ‖g‖, what the step would take off a linear h.
"""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app

from experiments import common, config_flags, lanes, model_statistics, probes, reports, sweep
from experiments.align import AlignConfig
from experiments.config_flags import flag
from experiments.sweep_report import folder_name
from jaxvaccine import data, defenses
from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.defenses.base import Defense, global_norm
from jaxvaccine.llama import Llama
from jaxvaccine.losses import causal_lm_loss

# What is measured, with units: drawn and put in a table.
MEASURED = {
    "regularizer_angle": "angle of the regularizer's gradients (degrees)",
    "regularizer_ratio": "‖approximate‖ / ‖exact‖, regularizer",
    "total_angle": "angle of the whole gradients (degrees)",
    "total_ratio": "‖approximate‖ / ‖exact‖, whole gradient",
    "predicted_drop": "predicted drop alpha ‖∇h‖ (nats per token)",
    "real_drop": "real drop h(w) − h(w') (nats per token)",
}


@dataclasses.dataclass(frozen=True)
class ApproximationConfig:
    """Flags of approximation.py beside those of align.py."""

    run_dir: str = flag("", "Folder of the whole measurement.")
    bases: tuple[str, ...] = flag(("world",), "Models to align.")
    methods: tuple[str, ...] = flag(("booster", "booster:exact=true"), "Defenses to follow, as of sweep.py.")
    seeds: tuple[str, ...] = flag(("0", "1", "2"), "Seeds of the alignment.")
    alignment_probe: str = flag("world_refusal@train[0:25],world_benign@train[0:25]",
                                "Alignment examples to measure on.")
    harmful_probe: str = flag("world_harmful@harmful[0:50]", "Harmful examples to measure on.")
    measure_every: int = flag(15, "Alignment steps between measurements.")
    overwrite: bool = flag(False, "Delete an earlier measurement in --run_dir and start again.")

    def __post_init__(self):
        common.require(self, "run_dir", bool(self.run_dir), "a folder")
        for name in ("bases", "methods"):
            common.require(self, name, bool(getattr(self, name)), "at least one")
        common.require_numbers(self, "seeds")
        common.require(self, "measure_every", self.measure_every >= 1, "at least 1")
        for name in ("alignment_probe", "harmful_probe"):
            common.require(self, name, bool(getattr(self, name)), "a data source")
        common.check_sources(self, "alignment_probe", "harmful_probe")


def compare(x, y):
    """(angle in degrees, ‖x‖ / ‖y‖) of two trees. Exact for small angles too, which a cosine is not."""
    x_norm, y_norm = global_norm(x), global_norm(y)
    unit_x, unit_y = jax.tree.map(lambda a: a / x_norm, x), jax.tree.map(lambda a: a / y_norm, y)
    difference = global_norm(jax.tree.map(jnp.subtract, unit_x, unit_y))
    total = global_norm(jax.tree.map(jnp.add, unit_x, unit_y))
    return jnp.degrees(2 * jnp.arctan2(difference, total)), x_norm / y_norm


@functools.lru_cache(maxsize=8)
def _measure(model: Llama, lam: float, alpha: float):
    loss_fn = causal_lm_loss(model)
    nothing = Defense(init=lambda adapter: (), gradient=lambda adapter, frozen, state, batches, key: (
        jax.tree.map(jnp.zeros_like, adapter), state, {}))

    def measure(adapter, frozen, batches):
        (approximate, metrics), (exact, _) = (
            defenses.booster(loss_fn, 1.0, alpha, base=nothing, exact=exact).gradient(
                adapter, frozen, (), batches, None)[::2] for exact in (False, True))
        alignment, _ = jax.grad(loss_fn, has_aux=True)(adapter, frozen, batches["alignment"])
        regularizer_angle, regularizer_ratio = compare(approximate, exact)
        total_angle, total_ratio = compare(
            *(jax.tree.map(lambda f, r: f + lam * r, alignment, regularizer) for regularizer in (approximate, exact)))
        return {"regularizer_angle": regularizer_angle, "regularizer_ratio": regularizer_ratio,
                "total_angle": total_angle, "total_ratio": total_ratio,
                "predicted_drop": alpha * metrics["harmful_gradient_norm"],
                "real_drop": metrics["harmful_loss"] - metrics["perturbed_harmful_loss"]}

    return jax.jit(jax.vmap(measure, in_axes=(0, None, None)))


def measure_gradients(config: ApproximationConfig, method: AlignConfig, tokenizer):
    """(step, lanes) -> what MEASURED names, [N] each, with the method's lam and alpha; without dropout."""
    batches = {}
    for name in ("alignment", "harmful"):
        examples = data.load_examples(getattr(config, f"{name}_probe"))
        rows = data.tokenize_examples(tokenizer, examples, method.max_length)
        length = data.bucket_length(max(len(ids) for ids in rows.input_ids), method.bucket)
        batches[name] = data.collate(rows, range(len(rows.input_ids)), length)

    def measure(step: int, of: lanes.Lanes) -> probes.Measured:
        del step
        return jax.device_get(_measure(of.model, method.lam, method.alpha)(of.adapters, of.frozen, batches))

    return measure


def approximation(config: ApproximationConfig, align_config: AlignConfig) -> str:
    """Carries out the alignments that are not there yet; returns the report."""
    methods = {text: sweep.variant(align_config, text, "methods", "defense") for text in config.methods}
    for text, method in methods.items():
        if not (method.lam > 0 and method.alpha > 0):
            raise ValueError(f"--methods: found {text!r}, with lam {method.lam} and alpha {method.alpha}, expected "
                             "both above 0")
    probes.open_run(config, "approximation", align=align_config)
    root, seeds = Path(config.run_dir), [int(seed) for seed in config.seeds]
    for base_name, (text, method) in itertools.product(config.bases, methods.items()):
        method = dataclasses.replace(method, model=base_name)
        tokenizer = data.load_tokenizer(hugging_face.resolve_model(base_name))
        probes.align(method, common.load_base(base_name, method.dtype), tokenizer, seeds,
                     root / folder_name(base_name) / folder_name(text), measure_gradients(config, method, tokenizer),
                     config.measure_every)
    return write(root, config)


def write(root: Path, config: ApproximationConfig) -> str:
    """report.md with its plot; returns its text."""
    curves = {name: model_statistics.read_alignment(root, config.bases, config.methods, name) for name in MEASURED}
    figure, axes = reports.panels(2, 3)
    model_statistics.plot(axes, {MEASURED[name]: by_method for name, by_method in curves.items()}, "alignment step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(root / "approximation.png", dpi=130)
    rows = []
    for method in config.methods:
        steps = curves["real_drop"][method][0]
        for i in sorted({0, len(steps) // 2, len(steps) - 1}):
            rows.append([method, str(steps[i]), *(model_statistics.spread(curves[name][method][1][i])
                                                  for name in MEASURED)])
    text = "\n".join([
        "# Booster's approximation\n", reports.table(["trained with", "step", *MEASURED.values()], rows),
        "![angles, ratios and drops along the alignment](approximation.png)\n",
        f"Mean ± standard deviation over bases ({', '.join(config.bases)}) and seeds ({', '.join(config.seeds)}). "
        "Approximate: ∇h(w) − ∇h(w'), exact: the gradient of h(w) − h(w') through w'. An angle of 0 and a ratio of 1 "
        "would be no difference.\n"])
    (root / reports.REPORT).write_text(text, encoding="utf-8")
    return text


def main(argv: list[str]) -> None:
    with common.readable_errors("approximation", argv):
        print(approximation(config_flags.read(ApproximationConfig), sweep.read_align_config()))


if __name__ == "__main__":
    config_flags.define(ApproximationConfig)
    sweep.define_align_config()
    app.run(main)
