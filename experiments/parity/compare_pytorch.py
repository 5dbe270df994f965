"""Trains the same steps with jaxvaccine and with plain PyTorch, and says how far they are apart, step for step.

  python -m experiments.parity.compare_pytorch --model=tiny --dtype=float64 --steps=50 --run_dir=runs/parity
  python -m experiments.parity.compare_pytorch --model=DIRECTORY --steps=3 --run_dir=runs/parity_real

Takes an alignment's flags; dropout is 0. Both sides start from the same weights and adapter and see the same batches;
T-Vaccine's layers are drawn by jaxvaccine for both, with probabilities that are compared. Each side runs in a process
of its own, PyTorch on the CPU. --dtype=bfloat16 adds what may be expected at that precision: PyTorch against itself
with another number of threads, and how far either side is from PyTorch in float32."""

import dataclasses
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from absl import flags

from experiments.parity import steps as parity
from experiments.parity.steps import METHODS, Problem, StepRecord
from jaxvaccine import cli, data
from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.experiment import recipes, runs, stage
from jaxvaccine.experiment.align import AlignConfig, batch_sources, check_layers, load_data, tokenize
from jaxvaccine.experiment.config import Part, field, flat, make, require
from jaxvaccine.experiment.methods import RepNoise, Tar
from jaxvaccine.experiment.parts import split_operational
from jaxvaccine.json_files import read_json, write_json
from jaxvaccine.report import runs as reports
from jaxvaccine.report.divergence import method_text, summary, write_comparison_report

RESULTS = "comparison.json"
TEXTS = {name: method_text(values) for name, values in METHODS.items()}


@dataclasses.dataclass(frozen=True)
class CompareConfig(Part):
    """Comparison."""

    run_dir: str = field("", "Folder of this comparison.")
    overwrite: bool = field(False, "Delete an earlier comparison in --run_dir and start again.")
    model: str = field("tiny", "A Hugging Face directory, hub id or .gguf file; or tiny: random weights and tokens.")
    defense: tuple[str, ...] = field(tuple(METHODS), f"What to compare, of {', '.join(METHODS)}.")
    dtype: Literal["float32", "float64", "bfloat16"] = field(
        "float32", "Of the frozen weights and of the computation; the adapter is float32, in float64 that too.")
    preset: str = field("", "A paper's recipe of a method, such as booster/sft; flags that are given go before it.")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.run_dir), "run_dir", self.run_dir, "a folder")
        require(bool(self.defense) and set(self.defense) <= set(METHODS), "defense", self.defense,
                f"some of {', '.join(METHODS)}")
        require(self.dtype != "float64" or self.model == "tiny", "dtype", self.dtype, "float32 or bfloat16 for a model "
                "that is not tiny: PyTorch's rotary angles are exact for a plain one only")
        if self.preset:
            recipes.parse_pair(self.preset)


class Side(NamedTuple):
    """What one side did, and what it cost."""

    records: list[StepRecord]
    peak_memory: int  # bytes: of the device, or where that is the CPU the process's resident memory


def _run_jax(problem: Problem) -> Side:
    import jax

    jax.config.update("jax_enable_x64", problem.dtype == "float64")
    # A GPU would otherwise multiply float32 matrices as TF32.
    jax.config.update("jax_default_matmul_precision", "highest")
    records = list(parity.jax_steps(problem))
    on_device = jax.devices()[0].memory_stats() or {}
    return Side(records, on_device.get("peak_bytes_in_use", stage.peak_resident_memory()))


def _run_torch(problem: Problem, drawn: Sequence[Any], threads: int | None) -> tuple[Side, int]:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    return Side(list(parity.torch_steps(problem, drawn)), stage.peak_resident_memory()), torch.get_num_threads()


def in_process(function: Callable, *arguments: Any) -> Any:
    """function(*arguments) in a process of its own: its memory is its own, and is free afterwards."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _tiny(config: AlignConfig, dtype: str, run_dir: Path) -> Problem:
    return parity.tiny_problem(run_dir / "model", config, dtype)


def _real(config: AlignConfig, dtype: str) -> Problem:
    import jax

    from jaxvaccine.llama import Llama, init_adapter

    path, training, part = config.model.model, config.training, config.data
    directory, architecture = hugging_face.resolve_model(path), stage.read_architecture(path)
    tokenizer = data.load_tokenizer(directory)
    data.check_vocabulary(tokenizer, architecture.vocab_size)
    # The batches are for all methods: RepNoise reads more data than the others, and TAR more of them.
    tokenized = tokenize(tokenizer, load_data(part, RepNoise()), part)
    tar = config.method if isinstance(config.method, Tar) else Tar()
    sources = batch_sources(tar, tokenized, training.batch_size, part.harmful_batch_size)
    batches = data.training_batches(sources, config.run.seed, part.bucket)
    adapter = init_adapter(Llama(architecture, config.adapter.lora()), stage.fresh_key(config.run.seed))
    return Problem(config, dtype, str(directory), jax.device_get(adapter),
                   [batches(step) for step in range(training.steps)])


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
    if problem.dtype == "bfloat16":
        other_threads = 1 if threads > 1 else 2
        again, _ = in_process(_run_torch, problem, drawn, other_threads)
        exact, _ = in_process(
            _run_torch, problem._replace(dtype="float32"), drawn, None)
        result["yardsticks"] = {
            f"PyTorch with {other_threads} thread(s) − PyTorch": differences(again, theirs),
            "PyTorch − PyTorch in float32": differences(theirs, exact),
            "JAX − PyTorch in float32": differences(ours, exact)}
    return result


def compare(config: CompareConfig, methods: Mapping[str, AlignConfig]) -> None:
    """Carries out the comparison; a method that has been compared in this folder is not compared again."""
    architecture = parity.TINY if config.model == "tiny" else stage.read_architecture(config.model)
    for of in methods.values():
        check_layers(of.method, architecture)
    result, operational = split_operational(flat(config))
    settings = {f"{name}.{key}": value for name, of in methods.items()
                for key, value in split_operational(flat(of))[0].items()}
    some = next(iter(methods.values()))
    hashes = {} if config.model == "tiny" else {
        name: runs.examples_hash(rows) for name, rows in load_data(some.data, RepNoise()).items()}
    run_dir = runs.open_run(config.run_dir, "compare_pytorch", {**settings, **result}, {"hashes": hashes}, operational,
                            config.overwrite)
    path = run_dir / RESULTS
    results: dict[str, Any] = read_json(path) if path.exists() else {}
    missing = {name: of for name, of in methods.items() if name not in results}
    if missing:
        # Weights, adapter and batches are the same for all methods; TAR's are told by its own settings.
        some = next((of for of in missing.values() if isinstance(of.method, Tar)), next(iter(missing.values())))
        prepared = (in_process(_tiny, some, config.dtype, run_dir) if config.model == "tiny"
                    else in_process(_real, some, config.dtype))
        for name, of in missing.items():
            results[name] = compare_method(prepared._replace(config=of))
            write_json(path, results)
            print(summary({name: results[name]}, TEXTS), flush=True)
    write_comparison_report(run_dir, f"jaxvaccine against PyTorch: {config.model}, {config.dtype}", results, METHODS)


def read_methods(config: CompareConfig, given: Mapping[str, Any]) -> dict[str, AlignConfig]:
    """Of every method its alignment: flat values that are given go before the preset, or before those of `tiny`."""
    preset = parity.TINY_FLAGS if config.model == "tiny" else {}
    if config.preset:
        preset = recipes.alignment(*recipes.parse_pair(config.preset))
    defaults = {
        "alignment_data": "embedded_refusal@train,embedded_benign@train", "harmful_data": "embedded_harmful@harmful",
        "steps": 3, **preset, **given, "model": config.model, "run_dir": config.run_dir, "dropout": 0.0,
        "save_every": 0, "progress": False, "epochs": 1.0}
    require(defaults["steps"] >= 1, "steps", defaults["steps"], "at least 1")
    return {name: make(AlignConfig, METHODS[name], {**defaults, "base_defense": "sft", "freeze": "layer"})
            for name in config.defense}


ALIGNMENT = cli.Section(AlignConfig, without=(
    "run_dir", "overwrite", "model", "start", "adapter", "dtype", "defense", "base_defense", "freeze", "dropout",
    "save_every", "progress", "epochs"))


def call(values: flags.FlagValues) -> None:
    with cli.flag_errors(""):
        config = make(CompareConfig, cli.given(cli.Section(CompareConfig), values))
        compare(config, read_methods(config, cli.given(ALIGNMENT, values)))
    print(reports.read(config.run_dir))


VERB = cli.Verb(__doc__, (cli.Section(CompareConfig), ALIGNMENT), call)

if __name__ == "__main__":
    cli.call("compare_pytorch", VERB)
