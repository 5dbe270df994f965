"""The alignment stage: a model is trained to refuse, with a defense."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxvaccine import data
from jaxvaccine.experiment import inputs, memory, stage
from jaxvaccine.experiment.config import choice, field, flat, require
from jaxvaccine.experiment.methods import ALIGNMENT, AlignmentMethod, Tar, TVaccine, uses
from jaxvaccine.experiment.parts import (
    SOURCE,
    AdapterPart,
    ModelPart,
    TokensPart,
    TrainingPart,
    TrainingRunPart,
    check_form,
    check_sources,
)
from jaxvaccine.llama import Llama, init_adapter
from jaxvaccine.llama_config import LlamaConfig

Examples = dict[str, list[data.Example]]


@dataclasses.dataclass(frozen=True)
class AlignmentData(TokensPart):
    """Data."""

    alignment_data: str = field("", f"Alignment data: {SOURCE}.")
    harmful_data: str = field(
        "", "Harmful data of Booster's simulated step, T-Vaccine's probe, RepNoise and TAR, in the same form.")
    harmless_data: str = field(
        "", "RepNoise: harmless answers to the prompts of --harmful_data, in any order, among others; --alignment_data "
        "unless given. A prompt without one gets a refusal of ours.")
    harmful_batch_size: int = field(10, "Rows of a harmful batch.", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.alignment_data), "alignment_data", self.alignment_data, "a data source")
        check_sources(self, "alignment_data", "harmful_data", "harmless_data")


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """All that an alignment depends on."""

    model: ModelPart
    data: AlignmentData
    adapter: AdapterPart
    method: AlignmentMethod = choice("defense", ALIGNMENT, "sft", "Alignment-stage defense.")
    training: TrainingPart = TrainingPart()
    run: TrainingRunPart = TrainingRunPart(run_dir="-")

    def __post_init__(self):
        require(bool(self.data.harmful_data) or not self.needs_harmful(), "harmful_data", self.data.harmful_data,
                f"a data source, which {flat(self)['defense']} needs")

    def needs_harmful(self) -> bool:
        return len(self.method.batches) > 1


def load_data(config: AlignmentData, method: AlignmentMethod) -> Examples:
    """The examples that the alignment reads."""
    load = functools.partial(data.load_examples, protocol=config.data_protocol, bad_rows=config.bad_rows)
    examples = {"alignment": load(config.alignment_data)}
    if "harmful" in method.batches:
        examples["harmful"] = load(config.harmful_data)
    if "harmless" in method.batches:
        harmless = load(config.harmless_data) if config.harmless_data else examples["alignment"]
        examples["harmless"] = data.harmless_answers(examples["harmful"], harmless)
    return examples


def batch_sources(method: AlignmentMethod, tokenized: Mapping[str, data.TokenizedExamples], batch_size: int,
                  harmful_batch_size: int) -> stage.Sources:
    """What `data.training_batches` draws a step's batches from, given the tokenized examples of `load_data`."""
    sizes = {"alignment": batch_size, "harmful": harmful_batch_size, "harmless": harmful_batch_size}
    sources = {name: (rows, sizes[name]) for name, rows in tokenized.items()}
    if tar := uses(method, Tar):
        # One batch for every step of the simulated attack, one below the other.
        sources["adversary"] = (tokenized["harmful"], harmful_batch_size * tar.inner_steps)
    return sources


def check_layers(method: AlignmentMethod, architecture: LlamaConfig) -> None:
    """Raises FieldError if T-Vaccine is to draw more layers than there are."""
    if t_vaccine := uses(method, TVaccine):
        require(t_vaccine.layers <= architecture.num_layers, "layers", t_vaccine.layers,
                f"at most the model's {architecture.num_layers} layers")


def tokenize(tokenizer, examples: Mapping[str, Sequence[data.Example]], part: TokensPart
             ) -> dict[str, data.TokenizedExamples]:
    """As ids, by name. Harmful and harmless examples stay pairs: what is empty in one is left out of the other.

    Raises:
      ValueError: as of `data.tokenize_examples`, or a harmful example that has lost its harmless one.
    """
    tokenized: dict[str, data.TokenizedExamples] = {}
    for name, rows in examples.items():
        if name == "harmless":
            rows = [e._replace(output="") if fate == "empty" else e
                    for e, fate in zip(rows, tokenized["harmful"].fates, strict=True)]
        tokenized[name] = data.tokenize_examples(tokenizer, rows, part.max_length, part.form)
    if "harmless" in tokenized and not np.array_equal(*(tokenized[name].prompt_lengths
                                                        for name in ("harmful", "harmless"))):
        raise ValueError(f"harmless_data: found {len(tokenized['harmless'].input_ids)} answers, expected one to each "
                         f"of {len(tokenized['harmful'].input_ids)} harmful prompts")
    return tokenized


class Prepared(NamedTuple):
    """A run before its first step."""

    run_dir: Path
    sources: stage.Sources  # of its batches
    architecture: LlamaConfig
    dtype: str  # of the frozen weights


def prepare(config: AlignConfig, look: Callable[[Examples], None] = lambda examples: None, write: bool = True
            ) -> Prepared:
    """Reads and checks all that the run needs but the weights, and opens its folder.

    look and errors: as of `align`. write: as of `runs.open_run`.
    """
    model, method = config.model, config.method
    examples = load_data(config.data, method)
    look(examples)
    architecture = stage.read_architecture(model.model, model.revision)
    check_layers(method, architecture)
    tokenizer = stage.load_tokenizer(model.model, model.revision)
    template = check_form(tokenizer, config.data.form)
    tokenized = tokenize(tokenizer, examples, config.data)
    dtype = stage.loaded_dtype(model.model, model.dtype, model.revision)
    model.check_attention(architecture, dtype, here=write)
    run_dir = stage.open_run(
        config, config.run, "align", examples, {"model": inputs.of_model(model.model, model.revision)},
        {**stage.training_record(examples, tokenized), "dtype": dtype, **template}, write=write)
    sources = batch_sources(method, tokenized, config.training.batch_size, config.data.harmful_batch_size)
    return Prepared(run_dir, sources, architecture, dtype)


def step_of(config: AlignConfig, model: Llama, length: int) -> memory.Step:
    """What a step's memory depends on, with remat as of `ComputationPart.on`; config's own model and data are not read.

    length: the longest batch's.
    """
    return memory.Step(
        config.model.on(model.clone(lora=config.adapter.lora())), config.method, config.training.batch_size,
        config.data.harmful_batch_size, length, config.model.quantisation, config.training.kind)


def align(config: AlignConfig, look: Callable[[Examples], None] = lambda examples: None) -> Path:
    """Carries out the run, or goes on with it; returns its folder at once if it has finished.

    Args:
      config: of the run.
      look: is shown the examples that were read, before anything is trained.

    Raises:
      FieldError, ValueError, FileNotFoundError: bad input, before anything is written.
      FileExistsError: the folder holds another run.
    """
    model, (run_dir, sources, _, _) = config.model, prepare(config, look)
    if inputs.is_finished(run_dir):
        return run_dir
    base = stage.load_base(model.model, model.dtype, revision=model.revision, quantisation=model.quantisation)
    step = step_of(config, base.model, stage.longest_batch(sources, config.data.bucket))
    adapted = memory.with_remat(model.remat, step).model
    adapter = init_adapter(adapted, stage.fresh_key(config.run.seed))
    stage.train(run_dir, base, adapted, adapter, config.method.make, sources, config.training, config.run,
                config.data.bucket, stage.Origin(model.model, model.revision))
    return run_dir
