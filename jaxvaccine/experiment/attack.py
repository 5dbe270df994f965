"""The attack: an aligned model is fine-tuned on a user's data of which a ratio is harmful."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxvaccine import data, defenses
from jaxvaccine.experiment import inputs, memory, runs, stage
from jaxvaccine.experiment.align import Examples, tokenize
from jaxvaccine.experiment.config import FieldError, Part, choice, field, flat, require
from jaxvaccine.experiment.methods import ALIGNMENT, FINE_TUNING, Ewc, TuningMethod
from jaxvaccine.experiment.parts import (
    AS_ALIGNED,
    SOURCE,
    AdapterPart,
    AfterAlignment,
    ComputationPart,
    LaterPrompt,
    LaterProtocol,
    TokensPart,
    TrainingPart,
    TrainingRunPart,
    check_sources,
)
from jaxvaccine.llama import Llama, init_adapter
from jaxvaccine.llama_config import LlamaConfig
from jaxvaccine.losses import causal_lm_loss
from jaxvaccine.quantisation import Kind


@dataclasses.dataclass(frozen=True)
class AttackedModel(ComputationPart):
    """Model."""

    aligned: str = field("", "Folder of the finished alignment to attack.")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.aligned), "aligned", self.aligned, "the folder of an alignment")


TEST = "the test prompts"  # among what an attack's data may not share a prompt with
# What a recipe says of a new adapter's shape; the aligned one has its own.
NEW_ADAPTER = ("rank", "lora_alpha", "targets")


def goes_on(adapter: str, defense: str, tuning: str) -> bool:
    """Whether an attack trains the aligned adapter on: of --adapter, the alignment's defense and the provider's."""
    continues = ALIGNMENT[defense].continues or FINE_TUNING[tuning].continues
    return adapter == "continue" or (adapter == "auto" and continues)


def split_new_adapter(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the recipe without a new adapter's shape, that shape)."""
    return ({name: value for name, value in recipe.items() if name not in NEW_ADAPTER},
            {name: value for name, value in recipe.items() if name in NEW_ADAPTER})


@dataclasses.dataclass(frozen=True)
class AttackAdapter(Part):
    """Adapter."""

    adapter: Literal["auto", "continue", "new"] = field(
        "auto", "Train the aligned adapter on, or a new one on the merged weights (beside quantised ones, the aligned "
        "adapter is frozen); auto continues Booster's and TAR's, whose simulated steps are that adapter's, and what "
        "EWC holds; presets leave it to auto.")
    rank: int | None = field(None, "LoRA rank of a new adapter; as aligned unless given.")
    lora_alpha: float | None = field(None, "LoRA alpha of a new adapter; as aligned unless given.")
    dropout: float | None = field(None, "LoRA dropout; as aligned unless given.")
    targets: tuple[str, ...] | None = field(None, "Projections of a new adapter; as aligned unless given.")
    only_layers: tuple[str, ...] | None = field(None, "Numbers, from 0, of the layers that train; all unless given.")

    def __post_init__(self):
        super().__post_init__()
        if self.only_layers is not None:
            require(bool(self.only_layers) and all(text.isdecimal() for text in self.only_layers), "only_layers",
                    self.only_layers, "numbers of at least 0")

    def layer_mask(self, num_layers: int) -> np.ndarray | None:
        """[L] bool, true where a layer trains; None for all. Raises FieldError for a layer that the model lacks."""
        if self.only_layers is None:
            return None
        numbers = [int(text) for text in self.only_layers]
        require(max(numbers) < num_layers, "only_layers", self.only_layers,
                f"numbers below {num_layers}, the model's number of layers")
        return np.isin(np.arange(num_layers), numbers)

    def resolve(self, aligned: Mapping[str, Any], method: TuningMethod) -> "AttackAdapter":
        """The part with nothing left open, given the alignment's flat values and the provider's method."""
        tuning = next(name for name, kind in FINE_TUNING.items() if isinstance(method, kind))
        require(not method.continues or self.adapter != "new", "adapter", self.adapter,
                f"auto or continue: {tuning} holds the aligned adapter")
        adapter = "continue" if goes_on(self.adapter, aligned["defense"], tuning) else "new"
        lora = {}
        for name in ("rank", "lora_alpha", "dropout", "targets"):
            as_aligned = tuple(aligned[name]) if name == "targets" else aligned[name]
            found = getattr(self, name)
            lora[name] = as_aligned if found is None else found
            if adapter == "continue" and name != "dropout" and lora[name] != as_aligned:
                raise FieldError(name, f"found {found!r}, expected {as_aligned!r}, as the continued adapter was aligned"
                                       + ("" if method.continues else ", or --adapter=new"))
        return dataclasses.replace(self, adapter=adapter, **lora)

    def sites(self) -> AdapterPart:
        """Of a resolved part."""
        return AdapterPart(self.rank, self.lora_alpha, self.dropout, self.targets)


@dataclasses.dataclass(frozen=True)
class AttackData(AfterAlignment, TokensPart):
    """Data."""

    user_data: str = field("", f"The user's benign data: {SOURCE}.")
    harmful_data: str = field(
        "", "Harmful data mixed in; may share no prompt with the alignment's data, unless rows are taken as they are.")
    test_data: str = field("", "Harmful test prompts, only to make sure that harmful_data shares none of them, or to "
                               "count those that it shares.")
    alignment_data: str = field("", "Lisa, EWC: alignment data, in the form of --user_data.")
    n: int = field(1000, "Examples in all.", at_least=1)
    poison_ratio: float = field(0.1, "Part of them that is harmful, 0 to 1; of --n the nearest whole number.")
    prompt: LaterPrompt = field(AS_ALIGNED, "The prompt that the model was aligned with: another is an error.")
    data_protocol: LaterProtocol = field(
        AS_ALIGNED, "The alignment's unless given: distinct prompts; or rows as they are, the first ones and no draw.")

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.poison_ratio <= 1, "poison_ratio", self.poison_ratio, "0 <= poison_ratio <= 1")
        try:
            harmful = data.harmful_count(self.n, self.poison_ratio)
        except ValueError as error:
            raise FieldError("poison_ratio", str(error).removeprefix("poison_ratio: ")) from error
        require(bool(self.harmful_data) or harmful == 0, "harmful_data", self.harmful_data,
                "a data source, unless --poison_ratio=0")
        require(bool(self.user_data) or harmful == self.n, "user_data", self.user_data,
                "a data source, unless --poison_ratio=1")
        check_sources(self, "user_data", "harmful_data", "test_data", "alignment_data")


@dataclasses.dataclass(frozen=True)
class AttackTraining(TrainingPart):
    """Optimizer."""

    learning_rate: float = field(1e-5, "Peak learning rate.")


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """All that an attack depends on."""

    model: AttackedModel
    data: AttackData
    adapter: AttackAdapter = AttackAdapter()
    method: TuningMethod = choice("defense", FINE_TUNING, "none", "The provider's defense while fine-tuning.")
    training: AttackTraining = AttackTraining()
    run: TrainingRunPart = TrainingRunPart(run_dir="-")

    def __post_init__(self):
        require(bool(self.data.alignment_data) or "alignment" not in self.method.batches, "alignment_data",
                self.data.alignment_data, f"a data source, which {flat(self)['defense']} needs")


class PoisonedData(NamedTuple):
    """What an attack trains on.

    Attributes:
      examples: the user's data with the harmful part mixed in, n of them, all of which are trained on.
      harmful: all harmful examples that the part was drawn from.
      poison_ratio: the part of the examples that is harmful.
      accounts: of the sources, "user" and "harmful"; `trained` is what was drawn.
      shared: how many prompts what was drawn has in common with what the model was aligned on and with the test, as of
        `data.shared_prompts`.
    """

    examples: list[data.Example]
    harmful: list[data.Example]
    poison_ratio: float
    accounts: dict[str, tuple[data.Account, ...]]
    shared: dict[str, dict[str, Any]]


def load_attack(config: AttackData, seed: int, known: Mapping[str, Collection[str]], tokenizer: Any = None
                ) -> PoisonedData:
    """The attack's data. It reads files and nothing else: two calls give the same.

    Args:
      config: names the data, n and poison_ratio.
      seed: of the draw.
      known: {what: fingerprints of its prompts} of all that the model was aligned on; no harmful example may be there,
        unless rows are taken as they are.
      tokenizer: examples that it cuts down to nothing are passed over; without one, none is.

    Raises:
      FieldError, ValueError, FileNotFoundError: as of `data.load` and `data.mix`; a text that the tokenizer would not
        read as text; or user's data with a test prompt.
    """
    rows = config.protocol == "rows"
    pools = {name: data.load(source, config.protocol) if source else ([], ())
             for name, source in (("user", config.user_data), ("harmful", config.harmful_data))}
    harmful = pools["harmful"][0]
    tests = stage.prompts_of(data.load_examples(config.test_data, config.protocol)) if config.test_data else []
    fates = None
    if tokenizer is not None:
        # All of them, so that no seed fails that another passes.
        for pool, _ in pools.values():
            data.check_training_texts(tokenizer, pool, config.form)
        fates = functools.partial(data.training_fates, tokenizer, max_length=config.max_length, prompt=config.form)
    others = {**known, TEST: tests}
    mixture = data.mix(pools["user"][0], harmful, config.n, config.poison_ratio, seed, {} if rows else others, fates,
                       first=rows)
    n, p = len(mixture.examples), mixture.poison_ratio
    if n != config.n or abs(p - config.poison_ratio) > 1e-6:
        logging.warning("asked for was n = %d, p = %g; trained on are %d examples, %d of them harmful: p = %g",
                        config.n, config.poison_ratio, n, len(mixture.harmful.chosen), p)
    drawn = {"user": mixture.benign, "harmful": mixture.harmful}
    prompts = {name: stage.prompts_of(of.chosen) for name, of in drawn.items()}
    shared = data.shared_prompts(prompts, others)
    for what, count in shared["user"]["shared"].items():
        require(rows or what != TEST, "user_data", config.user_data, "none of the test prompts among them")
        logging.warning("user_data: %d of %d prompts are also in %s", count, shared["user"]["prompts"], what)
    return PoisonedData(mixture.examples, harmful, mixture.poison_ratio, {
        name: data.tally(pools[name][1], of.seen, of.fates) for name, of in drawn.items()}, shared)


def read_data(config: AttackConfig, seed: int, known: Mapping[str, Collection[str]], tokenizer: Any = None
              ) -> tuple[Examples, PoisonedData]:
    """(what the attack and the provider's method train on, the former in detail). Arguments and errors as of
    `load_attack`; the harmful part shares no prompt with the provider's alignment data either."""
    more: Examples = {}
    if "alignment" in config.method.batches:
        more["alignment"] = data.load_examples(config.data.alignment_data, config.data.protocol)
    own = {f"the {name} data of the fine-tuning": stage.prompts_of(rows) for name, rows in more.items()}
    poisoned = load_attack(config.data, seed, {**known, **own}, tokenizer)
    return {"user": poisoned.examples, **more}, poisoned


def aligned_prompts(prompts: Mapping[str, Collection[str]]) -> dict[str, Collection[str]]:
    """`known` of `load_attack`, of a run's recorded prompts."""
    return {f"the alignment's {name} data": of for name, of in prompts.items()}


def masked(defense: defenses.Defense, layers) -> defenses.Defense:
    """The defense on all layers, or on those where `layers` ([L] bool) is true."""
    return defense if layers is None else defenses.only_layers(defense, layers)


def alignment_fisher(model: Llama, adapter, frozen, alignment: data.TokenizedExamples, batch_size: int, bucket: int,
                     seed: int):
    """EWC's Fisher weights, of the adapter that training starts from, on one pass over the alignment data."""
    steps = data.steps_for(len(alignment.input_ids), batch_size, 1)
    batches = data.training_batches({"alignment": (alignment, batch_size)}, seed, bucket)
    return defenses.diagonal_fisher(
        causal_lm_loss(model), adapter, frozen, (batches(step)["alignment"] for step in range(steps)))


class Prepared(NamedTuple):
    """An attack before its first step."""

    config: AttackConfig  # with nothing left open
    run_dir: Path
    sources: stage.Sources  # of its batches
    fisher: data.TokenizedExamples | None  # what EWC's weights are taken on
    architecture: LlamaConfig
    layers: np.ndarray | None  # as of `AttackAdapter.layer_mask`
    origin: stage.Origin
    dtype: str  # of the frozen weights
    quantisation: Kind  # and in what they are kept, as aligned


def prepare(config: AttackConfig, look: Callable[[Examples], None] = lambda examples: None, write: bool = True
            ) -> Prepared:
    """Reads and checks all that the attack needs but the weights, and opens its folder.

    look and errors: as of `attack`. write: as of `runs.open_run`.
    """
    aligned = inputs.require_finished("aligned", config.model.aligned)
    if aligned["script"] != "align":
        raise FieldError("aligned", f"found {config.model.aligned!r}, a run of {aligned['script']}, expected align's")
    config = dataclasses.replace(config, adapter=config.adapter.resolve(aligned["flags"], config.method),
                                 data=config.data.resolve(aligned["flags"], config.model.aligned))
    origin = stage.Origin(aligned["flags"]["model"], aligned["flags"]["revision"],
                          config.model.aligned if config.adapter.adapter == "new" else "")
    of_model, quantisation = (origin.model, origin.revision), runs.flag(aligned, "quantisation")
    architecture = stage.read_architecture(*of_model)
    layers = config.adapter.layer_mask(architecture.num_layers)
    dtype = stage.loaded_dtype(origin.model, config.model.dtype, origin.revision)
    config.model.check_attention(architecture, dtype, here=write)
    tokenizer = stage.load_tokenizer(*of_model)
    read, poisoned = read_data(config, config.run.seed, aligned_prompts(aligned["data"]["prompts"]), tokenizer)
    look(read)
    tokenized = tokenize(tokenizer, read, config.data)
    examples = {**read, "harmful": poisoned.harmful}
    run_dir = stage.open_run(
        config, config.run, "finetune", examples,
        {"model": inputs.of_model(*of_model), "aligned": inputs.of_run(config.model.aligned)},
        {**stage.training_record(examples, tokenized, poisoned.accounts, poisoned.shared),
         "poison_ratio": poisoned.poison_ratio, "n": len(tokenized["user"].input_ids), "dtype": dtype},
        {"model": origin.model, "revision": origin.revision, "quantisation": quantisation}, write=write)
    fisher = tokenized.pop("alignment") if isinstance(config.method, Ewc) else None
    sources = {name: (rows, config.training.batch_size) for name, rows in tokenized.items()}
    return Prepared(config, run_dir, sources, fisher, architecture, layers, origin, dtype, quantisation)


def step_of(config: AttackConfig, model: Llama, length: int, quantisation: Kind) -> memory.Step:
    """`align.step_of` of an attack with nothing left open."""
    rows, model = config.training.batch_size, config.model.on(model.clone(lora=config.adapter.sites().lora()))
    return memory.Step(model, config.method, rows, rows, length, quantisation)


def attack(config: AttackConfig, look: Callable[[Examples], None] = lambda examples: None) -> Path:
    """Carries out the run, or goes on with it; returns its folder at once if it has finished.

    Args:
      config: of the run.
      look: is shown the examples that were read, before anything is trained.

    Raises:
      FieldError, ValueError, FileNotFoundError: bad input, before anything is written.
      FileExistsError: the folder holds another run.
    """
    config, run_dir, sources, for_fisher, _, layers, origin, _, quantisation = prepare(config, look)
    if inputs.is_finished(run_dir):
        return run_dir
    base = stage.load_base(origin.model, config.model.dtype, config.model.aligned, bool(origin.aligned),
                           origin.revision, quantisation)
    step = step_of(config, base.model, stage.longest_batch(sources, config.data.bucket), quantisation)
    model = memory.with_remat(config.model.remat, step).model
    adapter = init_adapter(model, stage.fresh_key(config.run.seed)) if base.adapter is None else base.adapter
    fisher = for_fisher and alignment_fisher(model, adapter, base.frozen, for_fisher, config.training.batch_size,
                                             config.data.bucket, config.run.seed)
    steps = stage.count_steps(config.training, sources)
    stage.train(run_dir, base, model, adapter,
                lambda model: masked(config.method.make(model, steps, fisher), layers), sources, config.training,
                config.run, config.data.bucket, origin)
    return run_dir
