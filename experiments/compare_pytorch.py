"""Trains the same steps with jaxvaccine and with plain PyTorch, and says how far they are apart, step for step.

  python -m experiments.compare_pytorch --model=tiny --dtype=float64 --steps=50 --run_dir=runs/parity
  python -m experiments.compare_pytorch --model=<directory, hub id or .gguf> --steps=3 --run_dir=runs/parity_real

Takes align.py's flags; dropout is 0. Both sides start from the same weights and adapter and see the same batches;
T-Vaccine's layers are drawn by jaxvaccine for both, with probabilities that are compared. Each side runs in a process
of its own, PyTorch on the CPU. --dtype=bfloat16 adds what may be expected at that precision: PyTorch against itself
with another number of threads, and how far either side is from PyTorch in float32.
"""

import dataclasses
import math
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from absl import app, flags

from experiments import common, config_flags, parity, presets, reports
from experiments.align import AlignConfig, batch_sources, load_data
from experiments.config_flags import flag
from experiments.parity import METHODS, Problem, StepRecord
from jaxvaccine import data, runs
from jaxvaccine.checkpoints import hugging_face

RESULTS = "comparison.json"
PLOT = "divergence.png"
HEADINGS = {
    "loss": "loss, abs.", "gradient": "gradient, rel.", "cosine": "1 − cosine", "adapter": "adapter, rel.",
    "movement": "adapter, of its movement", "probabilities": "probabilities, abs."}


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Flags of compare_pytorch.py that align.py has not, or has in another form."""

    run_dir: str = flag("", "Folder of this comparison.")
    overwrite: bool = flag(False, "Delete an earlier comparison in --run_dir and start again.")
    model: str = flag("tiny", "A Hugging Face directory, a hub id or a .gguf file; or tiny: random weights and tokens.")
    defense: tuple[str, ...] = flag(tuple(METHODS), f"What to compare, of {', '.join(METHODS)}.")
    steps: int = flag(3, "Training steps.")
    dtype: Literal["float32", "float64", "bfloat16"] = flag(
        "float32", "Of the frozen weights and of the computation; the adapter is float32, in float64 that too.")
    alignment_data: str = flag("embedded_refusal@train,embedded_benign@train",
                               "Alignment data, as of align.py; tiny has its own.")
    harmful_data: str = flag("embedded_harmful@harmful", "Harmful data, as of align.py; tiny has its own.")

    def __post_init__(self):
        common.require(self, "run_dir", bool(self.run_dir), "a folder")
        common.require(self, "defense", bool(self.defense) and set(self.defense) <= set(METHODS),
                       f"some of {', '.join(METHODS)}")
        common.require(self, "steps", self.steps >= 1, "at least 1")
        common.require(self, "dtype", self.dtype != "float64" or self.model == "tiny", "float32 or bfloat16 for a "
                       "model that is not tiny: PyTorch's rotary angles are exact for a plain one only")


class Side(NamedTuple):
    """What one side did, and what it cost."""

    records: list[StepRecord]
    peak_memory: int  # bytes: of the device, or where that is the CPU the process's resident memory


def _run_jax(problem: Problem) -> Side:
    import jax

    jax.config.update("jax_enable_x64", problem.config.dtype == "float64")
    # A GPU would otherwise multiply float32 matrices as TF32.
    jax.config.update("jax_default_matmul_precision", "highest")
    records = list(parity.jax_steps(problem))
    on_device = jax.devices()[0].memory_stats() or {}
    return Side(records, on_device.get("peak_bytes_in_use", common.peak_resident_memory()))


def _run_torch(problem: Problem, drawn: Sequence[Any], threads: int | None) -> tuple[Side, int]:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    return Side(list(parity.torch_steps(problem, drawn)), common.peak_resident_memory()), torch.get_num_threads()


def in_process(function: Callable, *arguments: Any) -> Any:
    """function(*arguments) in a process of its own: its memory is its own, and is free afterwards."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _tiny(config: AlignConfig, run_dir: Path) -> Problem:
    return parity.tiny_problem(run_dir / "model", config)


def _real(config: AlignConfig) -> Problem:
    import jax

    from jaxvaccine.llama import Llama, init_adapter

    directory = hugging_face.resolve_model(config.model)
    architecture = common.read_architecture(config.model)
    tokenizer = data.load_tokenizer(directory)
    data.check_vocabulary(tokenizer, architecture.vocab_size)
    # The batches are for all methods: RepNoise reads more data than the others, and TAR more of them.
    examples = load_data(dataclasses.replace(config, defense="repnoise", base_defense="sft"))
    tokenized = {name: data.tokenize_examples(tokenizer, rows, config.max_length) for name, rows in examples.items()}
    sources = batch_sources(dataclasses.replace(config, defense="tar", base_defense="sft"), tokenized)
    batches = data.training_batches(sources, config.seed, config.bucket)
    adapter = init_adapter(Llama(architecture, common.lora_of(config)), common.fresh_key(config))
    return Problem(config, str(directory), jax.device_get(adapter), [batches(step) for step in range(config.steps)])


def compare_method(problem: Problem) -> dict[str, Any]:
    """Both sides' steps of one method and how far they are apart; JSON values."""
    ours = in_process(_run_jax, problem)
    drawn = [record.active_layers for record in ours.records]
    theirs, threads = in_process(_run_torch, problem, drawn, None)

    def differences(found: Side, expected: Side) -> list[dict[str, float]]:
        return [parity.compare(a, b, problem.adapter)._asdict()
                for a, b in zip(found.records, expected.records, strict=True)]

    result: dict[str, Any] = {
        "steps": [{
            "step": i, **difference, "loss_jax": a.loss, "loss_pytorch": b.loss, "seconds_jax": a.seconds,
            "seconds_pytorch": b.seconds,
            "active_layers": None if b.active_layers is None else b.active_layers.nonzero()[0].tolist(),
        } for i, (a, b, difference) in enumerate(zip(
            ours.records, theirs.records, differences(ours, theirs), strict=True))],
        "peak_memory_jax": ours.peak_memory, "peak_memory_pytorch": theirs.peak_memory, "threads_pytorch": threads}
    if problem.config.dtype == "bfloat16":
        other_threads = 1 if threads > 1 else 2
        again, _ = in_process(_run_torch, problem, drawn, other_threads)
        exact, _ = in_process(
            _run_torch, problem._replace(config=dataclasses.replace(problem.config, dtype="float32")), drawn, None)
        result["yardsticks"] = {
            f"PyTorch with {other_threads} thread(s) − PyTorch": differences(again, theirs),
            "PyTorch − PyTorch in float32": differences(theirs, exact),
            "JAX − PyTorch in float32": differences(ours, exact)}
    return result


def _shown(step: Mapping[str, float], name: str) -> str:
    return f"{max(0.0, 1 - step['cosine']) if name == 'cosine' else step[name]:.1e}"


def _worst(steps: Sequence[Mapping[str, float]]) -> list[str]:
    return [max((_shown(step, name) for step in steps), key=float) for name in HEADINGS]


def summary(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown table: a line per method with the largest difference over its steps, and what a step costs."""
    rows = []
    for method, result in results.items():
        seconds = [statistics.median(step[f"seconds_{side}"] for step in result["steps"][1:] or result["steps"])
                   for side in ("jax", "pytorch")]
        memory = [result[f"peak_memory_{side}"] / 1e6 for side in ("jax", "pytorch")]
        rows.append([method, *_worst(result["steps"]), *[f"{s:.3g}" for s in seconds], *[f"{m:.0f}" for m in memory]])
        rows += [[name, *_worst(steps), *["–"] * 4] for name, steps in result.get("yardsticks", {}).items()]
    return reports.table(["", *HEADINGS.values(), "s/step JAX", "PyTorch", "MB JAX", "PyTorch"], rows)


def step_table(result: Mapping[str, Any], shown: int = 10) -> str:
    """Markdown table of one method's steps, at most about `shown` of them."""
    steps = result["steps"]
    every = math.ceil(len(steps) / shown)
    rows = [[str(s["step"]), f"{s['loss_jax']:.6f}", f"{s['loss_pytorch']:.6f}",
             *[_shown(s, name) for name in ("gradient", "cosine", "adapter")],
             "all" if s["active_layers"] is None else " ".join(map(str, s["active_layers"]))]
            for s in steps if s["step"] % every == 0 or s is steps[-1]]
    return reports.table(["step", "loss JAX", "loss PyTorch", HEADINGS["gradient"], HEADINGS["cosine"],
                          HEADINGS["adapter"], "active layers"], rows)


def write_report(run_dir: Path, title: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """divergence.png and report.md."""
    figure, axes = reports.panels(2)
    for axis, name in zip(axes, ("gradient", "adapter"), strict=True):
        for i, (method, result) in enumerate(results.items()):
            yardstick = result.get("yardsticks", {}).get("PyTorch − PyTorch in float32", [])
            for steps, style in ((result["steps"], "-"), (yardstick, ":")):
                # A logarithm has no place for 0, which is what there is before the first update.
                points = [(step, s[name]) for step, s in enumerate(steps) if s[name] > 0]
                axis.plot([p[0] for p in points], [p[1] for p in points], style, color=f"C{i}", marker=".",
                          markersize=4, linewidth=1, label=method if style == "-" else None)
        axis.set(yscale="log", xlabel="step", title=f"{name}: ‖JAX − PyTorch‖ / ‖PyTorch‖")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, loc="lower right")
    figure.savefig(run_dir / PLOT, dpi=130)
    text = [f"# {title}\n", "The largest difference over all steps, and the median cost of a step after the first:\n",
            summary(results), f"![divergence]({PLOT})\n"]
    if any("yardsticks" in result for result in results.values()):
        text.append("Dotted: PyTorch against itself in float32.\n")
    for method, result in results.items():
        text += [f"## {method}\n", step_table(result)]
    (run_dir / reports.REPORT).write_text("\n".join(text), encoding="utf-8")


def compare(config: CompareConfig, methods: Mapping[str, AlignConfig]) -> None:
    """Carries out the comparison; a method that has been compared in this folder is not compared again."""
    architecture = parity.TINY if config.model == "tiny" else common.read_architecture(config.model)
    for name, flags_of in methods.items():
        common.require(flags_of, "layers", "t_vaccine" not in name or flags_of.layers <= architecture.num_layers,
                       f"at most the model's {architecture.num_layers} layers")
    result, operational = common.result_flags(config)
    settings = {name: value for name, value in common.result_flags(next(iter(methods.values())))[0].items()
                if name not in ("base_defense", "freeze")}
    hashes = {} if config.model == "tiny" else {
        name: runs.examples_hash(common.load_sources(getattr(config, name)))
        for name in ("alignment_data", "harmful_data")}
    run_dir = runs.open_run(config.run_dir, "compare_pytorch", {**settings, **result}, {"hashes": hashes}, operational,
                            config.overwrite)
    path = run_dir / RESULTS
    results: dict[str, Any] = runs.read_json(path) if path.exists() else {}
    missing = {name: flags_of for name, flags_of in methods.items() if name not in results}
    if missing:
        # Weights, adapter and batches are the same for all methods.
        anyone = next(iter(missing.values()))
        prepared = in_process(_tiny, anyone, run_dir) if config.model == "tiny" else in_process(_real, anyone)
        for name, flags_of in missing.items():
            results[name] = compare_method(prepared._replace(config=flags_of))
            runs.write_json(path, results)
            print(summary({name: results[name]}), flush=True)
    write_report(run_dir, f"jaxvaccine against PyTorch: {config.model}, {config.dtype}", results)


def main(argv: list[str]) -> None:
    with common.readable_errors("compare_pytorch", argv):
        config = config_flags.read(CompareConfig)
        preset = presets.ALIGN.get(flags.FLAGS.preset, parity.TINY_FLAGS if config.model == "tiny" else None)
        given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        methods = {name: config_flags.read(
            AlignConfig, preset=preset, **given | {"dropout": 0.0, "base_defense": "sft", "freeze": "layer",
                                                   "save_every": 0, "progress": False, "epochs": 1.0} | METHODS[name])
            for name in config.defense}
        compare(config, methods)
        print((Path(config.run_dir) / reports.REPORT).read_text(encoding="utf-8"))


if __name__ == "__main__":
    own = tuple(field.name for field in dataclasses.fields(CompareConfig))
    config_flags.define(CompareConfig)
    config_flags.define(AlignConfig, without=(
        *own, "base_defense", "freeze", "dropout", "save_every", "progress", "epochs"))
    flags.DEFINE_enum("preset", None, sorted(presets.ALIGN), "Published recipe; flags that are given go before it.")
    app.run(main)
