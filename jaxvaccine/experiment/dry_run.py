"""What align, finetune and evaluate would do, and what memory that takes: everything is checked, nothing is written.

Data are read and tokenised, settings and the run's folder are checked as by the run itself, which would raise the same
errors; weights are neither loaded nor needed.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxvaccine import data
from jaxvaccine.attacks.refusal_ablation import untied
from jaxvaccine.checkpoints.peft import read_lora_config
from jaxvaccine.evaluation.tasks import check_examples
from jaxvaccine.experiment import align, attack, chain, evaluate, inputs, memory, stage
from jaxvaccine.experiment.align import AlignConfig, Examples
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.attack_rows import take
from jaxvaccine.experiment.config import Part, field, require
from jaxvaccine.experiment.evaluate_config import LOSS, EvaluateConfig
from jaxvaccine.experiment.memory import GIB, Step, Target
from jaxvaccine.experiment.parts import TrainingPart
from jaxvaccine.llama import Llama
from jaxvaccine.memory import CARDS, card_device

Look = Callable[[Examples], None]


@dataclasses.dataclass(frozen=True)
class DryRun(Part):
    """Dry run."""

    dry_run: bool = field(
        False, "Check everything, say how many steps of which size would be made and what memory they take, and end: "
        "nothing is written, and no weights are loaded.")
    card: Literal[("", *CARDS)] = field(
        "", "--dry_run: the GPU that the run is meant for; by default this machine's, without one all of these.")

    def __post_init__(self):
        super().__post_init__()
        require(self.dry_run or not self.card, "card", self.card, "--dry_run beside it")

    def targets(self) -> list[Target]:
        """The cards that a program may fit."""
        if self.card:
            return [memory.card(self.card)]
        here = memory.this_machine()
        return [here] if here else [memory.card(name) for name in CARDS]


def of_alignment(config: AlignConfig, dry: DryRun, look: Look = lambda examples: None) -> str:
    """What `align` would do. Raises as it does."""
    prepared = align.prepare(config, look, write=False)
    config, sources, architecture, dtype = prepared.config, prepared.sources, prepared.architecture, prepared.dtype
    step = align.step_of(config, Llama(architecture, dtype=jnp.dtype(dtype).type),
                         stage.longest_batch(sources, config.data.bucket))
    return _training(config.model.remat, step, sources, config.training, config.data.bucket, dry)


def of_attack(config: AttackConfig, dry: DryRun, look: Look = lambda examples: None) -> str:
    """What `attack` would do. Raises as it does."""
    prepared = attack.prepare(config, look, write=False)
    config, sources = prepared.config, prepared.sources
    if config.adapter.trains != "adapter":
        return _without_formula(config, prepared, dry)
    step = attack.step_of(config, Llama(prepared.architecture, dtype=jnp.dtype(prepared.dtype).type),
                          stage.longest_batch(sources, config.data.bucket), prepared.quantisation)
    if of := prepared.candidates:  # which of them are trained on, the weights will say
        sources = {**sources, "user": (take(of.rows, np.arange(of.poisoned.n)), config.training.batch_size)}
    return _training(config.model.remat, step, sources, config.training, config.data.bucket, dry)


def _without_formula(config: AttackConfig, prepared: attack.Prepared, dry: DryRun) -> str:
    """Of an attack that trains no adapter: the steps, and what lies there throughout, without the activations."""
    steps = attack.count_steps(config, prepared.sources)
    if config.adapter.trains == "nothing":
        return f"{steps} steps: nothing trains"
    model = Llama(prepared.architecture, dtype=jnp.dtype(prepared.dtype).type)
    if config.ablation.when == "before":
        model = untied(model)
    weights, state = memory.all_weights_bytes(model, config.method)
    said = [f"{steps} steps that train all weights, padded to at most "
            f"{stage.longest_batch(prepared.sources, config.data.bucket)} tokens",
            f"GiB: weights that it starts from {weights / GIB:.2f}, train state {state / GIB:.2f}, gradients "
            f"{weights / GIB:.2f}",
            "activations come to it: of training all weights there is no formula"]
    floor = state + 2 * weights
    return "\n".join([*said, *(f"{memory.verdict(floor, target)}, if activations were nothing"
                               for target in dry.targets())])


def of_evaluation(config: EvaluateConfig, dry: DryRun) -> str:
    """What `evaluate` would do. Raises as it does, but for prompts that leave an answer no room."""
    require(not config.model.answers, "dry_run", True, "a model: nothing is generated with --answers")
    config, _, path, revision, examples, _, dtype = evaluate.prepare(config, write=False)
    tokenizer = stage.load_tokenizer(path, revision)
    if left := config.model.trained and inputs.left_model(config.model.trained):
        architecture = stage.read_architecture(str(inputs.model_dir(config.model.trained)))
    else:
        architecture = stage.read_architecture(path, revision)
    bare = left or config.model.merge_adapter or not config.model.trained
    lora = None if bare else _trained_lora(config.model.trained)
    model, generation = Llama(architecture, lora, jnp.dtype(dtype).type), config.generation
    said, targets = [], dry.targets()
    for task, rows in examples.items():
        if task == LOSS:
            continue
        check_examples(task, rows)
        prompts = data.encode_prompts(tokenizer, rows, prompt=config.tests.form, prefill=generation.begins(task))
        of = dataclasses.replace(
            memory.decoding(model, prompts, generation.longest(task), generation.eval_bucket, generation.rows),
            quantisation=config.model.quantisation)
        if len(targets) == 1 and not generation.eval_batch_size:
            of = dataclasses.replace(of, rows=max(1, min(_rows(of, targets[0].reserved), len(rows))))
        found = of.estimate()
        said += [f"{task}: {len(rows)} prompts, {of.rows} together, {of.positions} positions each",
                 f"GiB: {memory.parts(found)}", f"peak {found.peak / GIB:.2f} GiB by the formula"]
        said += [f"{memory.verdict(found.peak, target)}; largest --eval_batch_size {_rows(of, target.largest)}"
                 for target in targets]
    return "\n".join(said)


def _rows(of: memory.Decoding, room: int) -> int:
    """How many rows `evaluate` would decode together if JAX has so many bytes."""
    return memory.largest_decoding(of, of.beside(room))


def _trained_lora(run_dir: str):
    """Of the adapter that a finished run left, as `stage.load_base` takes it."""
    folder = inputs.adapter_dir(run_dir)
    return read_lora_config(folder.with_name(inputs.TRAINED) if chain.merged_under(run_dir) else folder)


def _training(remat: str, step: Step, sources: stage.Sources, part: TrainingPart, bucket: int, dry: DryRun) -> str:
    targets = dry.targets()
    if len(targets) == 1:
        step = memory.with_remat(remat, step, targets[0])
    counts = ", ".join(f"{name} {len(rows.input_ids)} examples, {size} a step"
                       for name, (rows, size) in sources.items())
    found = step.estimate()
    said = [f"{stage.count_steps(part, sources)} steps, padded to at most {step.length} tokens: {counts}",
            f"GiB, with remat={step.model.remat}: {memory.parts(found)}",
            f"peak {found.peak / GIB:.2f} GiB by the formula"]
    peak = found.peak
    if dry.card and (compiled := _compiled(step, dry.card)) is not None:
        peak = compiled
        said.append(f"peak {peak / GIB:.2f} GiB by XLA's compiler for {dry.card}")
    for target in targets:
        most = memory.largest_batch(step, target.largest)
        said.append(f"{memory.verdict(peak, target)}; largest batches {most}")
        helpful = memory.helpful_flag(step, target.largest, bucket) if peak > target.largest else None
        if helpful:
            flag, less, enough = helpful
            said.append(f"  {flag} takes {less / GIB:.2f} GiB" + ("" if enough else ", which is not enough"))
    return "\n".join(said)


def _compiled(step: Step, card: str) -> int | None:
    """The peak by the GPU's compiler; None where its wheels are not installed."""
    if jax.config.jax_platforms != "cpu":  # the plugin would look for its card, and fail without
        return None
    try:
        device = card_device(card)
    except ValueError:
        return None
    return step.compiled(device).peak
