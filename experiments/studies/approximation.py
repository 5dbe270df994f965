"""How good Booster's approximation is along the training: its gradient against the exact one, its predicted step
against the real one.

  python -m experiments.studies.approximation --run_dir=runs/approximation --seeds=0,1,2

Booster's regularizer is R(w) = h(w) − h(w − alpha g / ‖g‖), g = ∇h(w). Its paper (arXiv 2409.01586, eq. 3-4) takes
∇h(w) − ∇h(w') for ∇R, which leaves out how the step's direction depends on w. Measured on a fixed harmful batch and a
fixed alignment batch: the angle between the two gradients and the ratio of their norms, of the regularizer alone and of
the whole gradient ∇f + lam ∇R; and R beside alpha ‖g‖, what the step would take off a linear h."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from experiments.studies import study
from jaxvaccine import cli, data, defenses
from jaxvaccine.defenses.base import Defense, global_norm
from jaxvaccine.experiment.config import field, require
from jaxvaccine.experiment.lanes import over_lanes
from jaxvaccine.experiment.methods import Booster
from jaxvaccine.experiment.parts import check_sources
from jaxvaccine.experiment.plan_folder import Probes
from jaxvaccine.experiment.plans import Plan
from jaxvaccine.llama import Llama
from jaxvaccine.losses import causal_lm_loss
from jaxvaccine.report.curves import curves_report

MEASURED = ("regularizer_angle", "regularizer_ratio", "total_angle", "total_ratio", "predicted_drop", "real_drop")
NOTE = ("Approximate: ∇h(w) − ∇h(w'), exact: the gradient of h(w) − h(w') through w'. An angle of 0 and a ratio of 1 "
        "would be no difference.")


@dataclasses.dataclass(frozen=True)
class ApproximationConfig(study.StudyConfig):
    """Plan."""

    defenses: tuple[str, ...] = field(("booster", "booster:exact=true"), "Boosters to follow, as of run.")
    alignment_probe: str = field(
        "world_refusal@train[0:25],world_benign@train[0:25]", "Alignment examples to measure on.")
    harmful_probe: str = field("world_harmful@harmful[0:50]", "Harmful examples to measure on.")
    measure_every: int = field(15, "Alignment steps between measurements.", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        for name in ("alignment_probe", "harmful_probe"):
            require(bool(getattr(self, name)), name, getattr(self, name), "a data source")
        check_sources(self, "alignment_probe", "harmful_probe")

    def make_plan(self) -> Plan:
        return Plan.product(self.model, self.methods, ("",), [int(seed) for seed in self.seeds])


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

    return jax.jit(over_lanes(measure, (0, None, None)))


def check(aligned, attacked) -> None:
    """Raises FieldError for a method without a regularizer whose gradient could be compared."""
    method = aligned.method
    require(isinstance(method, Booster) and method.lam > 0 and method.alpha > 0, "defenses", method,
            "Booster with lam and alpha above 0")


def make_probes(config: ApproximationConfig) -> Probes:
    """What MEASURED names, with the method's lam and alpha; without dropout."""
    def alignment(align, tokenizer, seeds):
        booster = align.method
        batches = {}
        for name in ("alignment", "harmful"):
            rows = data.tokenize_examples(tokenizer, data.load_examples(getattr(config, f"{name}_probe")),
                                          align.data.max_length, align.data.form)
            length = data.bucket_length(max(len(ids) for ids in rows.input_ids), align.data.bucket)
            batches[name] = data.collate(rows, range(len(rows.input_ids)), length)

        def measure(step, of):
            return jax.device_get(_measure(of.model, booster.lam, booster.alpha)(of.adapters, of.frozen, batches))

        return measure

    return Probes(alignment, every=config.measure_every, check=check)


def report(config: ApproximationConfig, found, folder) -> str:
    return curves_report(found, folder, "Booster's approximation", MEASURED, note=NOTE, name="approximation")


VERB = study.verb(__doc__, ApproximationConfig, make_probes, report,
                  {"sst2_test": "", "benign_test": "", "loss_data": ""}, without=("attacks", "score_steps"))

if __name__ == "__main__":
    cli.call("approximation", VERB)
