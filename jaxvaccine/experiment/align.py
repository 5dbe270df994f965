"""The alignment stage: a model is trained to refuse, with a defense; as it comes, or again after it was fine-tuned."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from jaxvaccine import data
from jaxvaccine.experiment import chain, inputs, memory, runs, stage
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
class AlignedModel(ModelPart):
    """Model."""

    start: str = field("", "Folder of a finished fine-tuning or alignment whose model is aligned again. It has its own "
                           "--model, --revision and --quantisation.")

    @property
    def is_named(self) -> bool:
        return bool(self.model or self.start)

    def resolve(self, start: chain.Start) -> "AlignedModel":
        """The part with the model of what it starts from.

        Raises:
          FieldError: another is asked for.
        """
        name, run = start.below.run_dir, {"model": start.model, "revision": start.revision,
                                          "quantisation": runs.flag(start.below.config, "quantisation")}
        for field_name, none in (("model", ""), ("revision", ""), ("quantisation", "none")):
            found = getattr(self, field_name)
            require(found in (none, run[field_name]), field_name, found, f"{run[field_name]!r}, of {name}, or none")
        return dataclasses.replace(self, **run)


@dataclasses.dataclass(frozen=True)
class AlignedAdapter(AdapterPart):
    """Adapter."""

    adapter: Literal["new", "continue"] = field(
        "new", "--start: train a new adapter on the merged weights (beside quantised ones, the old one is frozen), or "
        "that of the run on.")

    def check(self, start: chain.Start) -> None:
        """Raises FieldError if the run that it starts from left no adapter that is to train on, or one of another
        shape."""
        if self.adapter == "new":
            return
        name, flags = start.below.run_dir, start.below.flags
        require(start.has_adapter, "adapter", self.adapter, f"new: {name} left a whole model, and no adapter")
        for of_shape in ("rank", "lora_alpha", "targets"):
            found, left = getattr(self, of_shape), flags[of_shape]
            require(found == (tuple(left) if of_shape == "targets" else left), of_shape, found,
                    f"{left!r}, as the adapter that {name} left, or --adapter=new")


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """All that an alignment depends on."""

    model: AlignedModel
    data: AlignmentData
    adapter: AlignedAdapter
    method: AlignmentMethod = choice("defense", ALIGNMENT, "sft", "Alignment-stage defense.")
    training: TrainingPart = TrainingPart()
    run: TrainingRunPart = TrainingRunPart(run_dir="-")

    def __post_init__(self):
        require(bool(self.model.start) or self.adapter.adapter == "new", "adapter", self.adapter.adapter,
                "new, unless --start names a run whose adapter trains on")
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

    config: AlignConfig  # with nothing left open
    run_dir: Path
    sources: stage.Sources  # of its batches
    origin: stage.Origin
    architecture: LlamaConfig
    dtype: str  # of the frozen weights


def prepare(config: AlignConfig, look: Callable[[Examples], None] = lambda examples: None, write: bool = True
            ) -> Prepared:
    """Reads and checks all that the run needs but the weights, and opens its folder.

    look and errors: as of `align`. write: as of `runs.open_run`.
    """
    start = None
    if config.model.start:
        start = chain.start_from("start", config.model.start, config.run.run_dir)
        config.adapter.check(start)
        config = dataclasses.replace(config, model=config.model.resolve(start))
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
    made_of = {"model": inputs.of_model(model.model, model.revision)}
    if start:
        made_of["start"] = inputs.of_run(model.start)
    run_dir = stage.open_run(
        config, config.run, "align", examples, made_of,
        {**stage.training_record(examples, tokenized), "dtype": dtype, **template,
         **(chain.record(start.links, "align") if start else {})}, write=write)
    sources = batch_sources(method, tokenized, config.training.batch_size, config.data.harmful_batch_size)
    merged = start.merged_under(config.adapter.adapter == "new") if start else ""
    return Prepared(config, run_dir, sources, stage.Origin(model.model, model.revision, merged), architecture, dtype)


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
    config, run_dir, sources, origin, _, _ = prepare(config, look)
    if inputs.is_finished(run_dir):
        return run_dir
    model = config.model
    base = stage.load_base(model.model, model.dtype, model.start or None, config.adapter.adapter == "new",
                           model.revision, model.quantisation)
    step = step_of(config, base.model, stage.longest_batch(sources, config.data.bucket))
    adapted = memory.with_remat(model.remat, step).model
    adapter = init_adapter(adapted, stage.fresh_key(config.run.seed)) if base.adapter is None else base.adapter
    stage.train(run_dir, base, adapted, adapter, config.method.make, sources, config.training, config.run,
                config.data.bucket, origin)
    return run_dir
