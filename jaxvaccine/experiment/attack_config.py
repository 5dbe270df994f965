"""All that an attack depends on: a user's fine-tuning of an aligned model, of whose data a ratio is harmful."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np

from jaxvaccine import data
from jaxvaccine.experiment import ablation, layer_choice
from jaxvaccine.experiment.ablation import ABLATIONS, NONE, NoAblation
from jaxvaccine.experiment.config import FieldError, Part, choice, field, flat, require
from jaxvaccine.experiment.methods import ALIGNMENT, FINE_TUNING, TuningMethod, Undefended
from jaxvaccine.experiment.objectives import OBJECTIVES, Objective, Plain, Unheld
from jaxvaccine.experiment.parts import (
    AS_ALIGNED,
    SOURCE,
    SYSTEM_PROMPT,
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
from jaxvaccine.llama_config import LlamaConfig
from jaxvaccine.quantisation import Kind


@dataclasses.dataclass(frozen=True)
class AttackedModel(ComputationPart):
    """Model."""

    aligned: str = field(
        "", "Folder of the finished alignment to attack, or of a finished fine-tuning of one, to go on with it.")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.aligned), "aligned", self.aligned, "the folder of an alignment")


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

    trains: Literal["adapter", "all", "nothing"] = field(
        "adapter", "What trains: an adapter; all weights, into which the aligned adapter is merged; or nothing, of an "
        "attack without training. What is said of the adapter is then not read.")
    adapter: Literal["auto", "continue", "new"] = field(
        "auto", "Train the adapter of --aligned on, or a new one on the merged weights (beside quantised ones, the old "
        "one is frozen); auto continues after Booster's and TAR's alignment, whose simulated steps are that adapter's, "
        "and what EWC holds; presets leave it to auto.")
    rank: int | None = field(None, "LoRA rank of a new adapter; as aligned unless given.")
    lora_alpha: float | None = field(None, "LoRA alpha of a new adapter; as aligned unless given.")
    dropout: float | None = field(None, "LoRA dropout; as aligned unless given.")
    targets: tuple[str, ...] | None = field(None, "Projections of a new adapter; as aligned unless given.")
    only_layers: tuple[str, ...] | None = field(
        None, "Numbers, from 0, of the layers that train; all unless given. frozen: those that T-Vaccine's alignment "
        "never had active. rarest:N: the N that it had active in the fewest steps.")

    def __post_init__(self):
        super().__post_init__()
        if self.only_layers is not None:
            layer_choice.check_text(self.only_layers)
            require(self.trains != "nothing", "only_layers", self.only_layers, "none with --trains=nothing")

    def layer_mask(self, num_layers: int, active_steps: np.ndarray | None = None) -> np.ndarray | None:
        """[L] bool, true where a layer trains; None for all. Arguments and errors as of `layer_choice.mask`."""
        return layer_choice.mask(self.only_layers, num_layers, active_steps)

    def resolve(self, aligned: Mapping[str, Any], method: TuningMethod, ablation: NoAblation = NONE,
                has_adapter: bool = True) -> "AttackAdapter":
        """The part with nothing left open, given the alignment's flat values, the provider's method and the attack's
        refusal ablation, before which an adapter can't have been trained.

        aligned: of a run that was fine-tuned since, with the adapter's shape as that run has it. has_adapter: whether
        that run left one to go on with, and no whole model.
        """
        tuning = next(name for name, kind in FINE_TUNING.items() if isinstance(method, kind))
        if self.trains != "adapter":
            require(self.trains != "all" or not method.continues, "trains", self.trains,
                    f"adapter: {tuning} holds the aligned adapter")
            require(self.trains != "all" or method.takes_losses, "trains", self.trains,
                    f"adapter: {tuning} is not made for all weights")
            shape = {name: tuple(aligned[name]) if name == "targets" else aligned[name]
                     for name in (*NEW_ADAPTER, "dropout")}
            return dataclasses.replace(self, adapter="auto", **shape)
        if ablation.when == "before":
            require(not method.continues, "ablate", ablation.when, f"none or after: {tuning} holds the aligned adapter")
            if self.adapter != "new":
                return dataclasses.replace(self, adapter="new").resolve(aligned, method, ablation, has_adapter)
        require(not method.continues or self.adapter != "new", "adapter", self.adapter,
                f"auto or continue: {tuning} holds the aligned adapter")
        adapter = "continue" if goes_on(self.adapter, aligned["defense"], tuning) else "new"
        if not has_adapter:
            require(not method.continues, "defense", tuning, "another: the run to start from left a whole model, and "
                    f"no adapter that {tuning} could hold")
            require(self.adapter != "continue", "adapter", self.adapter,
                    "auto or new: the run to start from left a whole model, and no adapter that could train on")
            adapter = "new"
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
    alignment_data: str = field("", "Lisa, EWC, unheld: alignment data, in the form of --user_data.")
    n: int = field(1000, "Examples in all.", at_least=1)
    poison_ratio: float = field(0.1, "Part of them that is harmful, 0 to 1; of --n the nearest whole number.")
    order: Literal["mixed", "harmful_first", "harmful_last"] = field(
        "mixed", "Harmful rows among the benign ones, or over the whole run before or behind all of them.")
    user_rows: Literal["drawn", "similar"] = field(
        "drawn", "Benign rows that are trained on: drawn, or of --candidates drawn ones those whose gradient is most "
        "like the mean of --harmful_data's.")
    candidates: int | None = field(None, "--user_rows=similar: benign rows drawn, to choose among.", at_least=1)
    prompt: LaterPrompt = field(
        AS_ALIGNED, "What is put around the user's examples, in his fine-tuning and in his questions after it: the "
        "prompt that the model was aligned with, or one that he chooses.")
    system_prompt: str | None = field(
        None, f"{SYSTEM_PROMPT}the alignment's unless given, and '' is what the template does itself.")
    prefill: str | None = field(
        None, "What he makes answers to harmful prompts begin with when the model is scored, as 'Sure, here is'.")
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
        self._check_candidates(self.n - harmful)
        check_sources(self, "user_data", "harmful_data", "test_data", "alignment_data")

    def _check_candidates(self, benign: int) -> None:
        if self.user_rows == "drawn":
            require(self.candidates is None, "candidates", self.candidates, "none, unless --user_rows=similar")
            return
        require(benign > 0, "user_rows", self.user_rows, "drawn with --poison_ratio=1, where no row is benign")
        require(bool(self.harmful_data), "harmful_data", self.harmful_data,
                "a data source, which --user_rows=similar compares with")
        require((self.candidates or 0) >= benign, "candidates", self.candidates,
                f"at least {benign}, the benign rows that are trained on")

    def resolve(self, flags: Mapping[str, Any], name: str) -> Self:
        """As of `AfterAlignment`, but that an attacker may choose another prompt, and then has no system prompt but his
        own."""
        if self.prompt == AS_ALIGNED:
            return super().resolve(flags, name)
        same = self.prompt == flags.get("prompt")
        own = dataclasses.replace(self, prompt=AS_ALIGNED, system_prompt=self.system_prompt if same else None)
        resolved = super(AttackData, own).resolve(flags, name)
        return resolved if same else dataclasses.replace(
            resolved, prompt=self.prompt, system_prompt=self.system_prompt)


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
    ablation: NoAblation = choice(
        "ablate", ABLATIONS, "none", "When the refusal direction is projected out of the weights: before the training, "
        "after it, or never. Before it, --trains=adapter trains a new adapter.")
    training: AttackTraining = AttackTraining()
    run: TrainingRunPart = TrainingRunPart(run_dir="-")
    objective: Objective = choice("objective", OBJECTIVES, "plain", "What the attacker descends.")

    @property
    def takes_fisher(self) -> bool:
        """Whether Fisher weights are taken on alignment data before the first step."""
        return self.method.takes_fisher or self.objective.takes_fisher

    @property
    def batches(self) -> tuple[str, ...]:
        """What a step reads."""
        return self.method.batches + self.objective.batches

    @property
    def reads(self) -> tuple[str, ...]:
        """What is read beside the user's data: of "alignment" and "harmful" what a step or Fisher weights need."""
        return tuple(name for name in ("alignment", "harmful")
                     if name in self.batches or (name == "alignment" and self.takes_fisher))

    def __post_init__(self):
        chosen = flat(self)
        of_method = self.method.takes_fisher or "alignment" in self.method.batches
        require(bool(self.data.alignment_data) or "alignment" not in self.reads, "alignment_data",
                self.data.alignment_data,
                f"a data source, which {chosen['defense' if of_method else 'objective']} needs")
        for name in (*(["objective"] if "harmful" in self.reads else []),
                     *(["ablate"] if self.ablation.when != "none" else [])):
            require(bool(self.data.harmful_data), "harmful_data", self.data.harmful_data,
                    f"a data source, which --{name}={chosen[name]} needs")
        require(isinstance(self.method, Undefended) or not self.objective.alone, "objective", chosen["objective"],
                f"plain or unheld beside {chosen['defense']}: with the others the attacker does the training")
        require(isinstance(self.objective, Plain) or self.adapter.trains == "adapter", "objective", chosen["objective"],
                f"plain with --trains={self.adapter.trains}: the others are of an adapter")
        require(self.data.user_rows == "drawn" or self.adapter.trains != "nothing", "user_rows", self.data.user_rows,
                "drawn with --trains=nothing")
        # A new adapter's A has no gradient before B has moved: what alignment doesn't hold there would never train.
        require(not isinstance(self.objective, Unheld) or self.adapter.adapter == "continue" or self.method.continues,
                "adapter", self.adapter.adapter, "continue, the aligned adapter, of whose weights unheld trains a part")

    @property
    def leaves_model(self) -> bool:
        """Whether the result is a whole model and no adapter."""
        return self.adapter.trains == "all" or self.ablation.when != "none"

    def check_weights(self, architecture: LlamaConfig, quantisation: Kind) -> None:
        """Raises FieldError if weights of such a model, kept so, can't be changed as the attack is to change them."""
        for name, asked in (("trains", self.adapter.trains == "all"), ("ablate", self.ablation.when != "none")):
            if asked:
                require(quantisation == "none", name, flat(self)[name], f"{'adapter' if name == 'trains' else 'none'}: "
                        f"the model was aligned on {quantisation} weights, which do not change")
        ablation.check(self.ablation, architecture)
