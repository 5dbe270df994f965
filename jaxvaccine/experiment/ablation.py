"""Refusal ablation as a part of an attack: before its training, after it, or without any."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np

from jaxvaccine import data
from jaxvaccine.attacks import refusal_ablation
from jaxvaccine.attacks.refusal_ablation import Direction
from jaxvaccine.experiment.config import FieldError, Part, field, require
from jaxvaccine.experiment.parts import SOURCE, check_sources
from jaxvaccine.llama import Llama
from jaxvaccine.llama_config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class NoAblation(Part):
    """Refusal ablation."""

    when: ClassVar[Literal["none", "before", "after"]] = "none"


NONE = NoAblation()


@dataclasses.dataclass(frozen=True)
class AblationBefore(NoAblation):
    """Refusal ablation."""

    when = "before"

    ablation_layer: int | None = field(
        None, "Number, from 0, of the layer before which the direction is read; unless given that, of the first 80%, "
        "where harmful and harmless prompts are furthest apart.", at_least=0)
    harmless_data: str = field(
        "", f"Harmless prompts, whose mean is taken from that of --harmful_data's: {SOURCE}. Answers are not read.")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.harmless_data), "harmless_data", self.harmless_data,
                f"a data source, which --ablate={self.when} needs")
        check_sources(self, "harmless_data")


@dataclasses.dataclass(frozen=True)
class AblationAfter(AblationBefore):
    """Refusal ablation."""

    when = "after"


ABLATIONS: dict[str, type[NoAblation]] = {"none": NoAblation, "before": AblationBefore, "after": AblationAfter}
HARMLESS = "harmless"  # the name of its data among a run's


class Prompts(NamedTuple):
    """Token ids of whole prompts."""

    harmful: Sequence[np.ndarray]
    harmless: Sequence[np.ndarray]


def load_harmless(part: NoAblation, protocol: data.Protocol, bad_rows: data.BadRows = "error"
                  ) -> dict[str, list[data.Example]]:
    """{"harmless": examples} of an ablation; nothing of none."""
    if not isinstance(part, AblationBefore):
        return {}
    return {HARMLESS: data.load_examples(part.harmless_data, protocol, bad_rows)}


def encode(tokenizer: Any, part: NoAblation, harmful: Sequence[data.Example], protocol: data.Protocol,
           form: data.Prompt, bad_rows: data.BadRows = "error") -> Prompts | None:
    """The prompts of an ablation, all of the harmful ones; None of none. Raises as `data.encode_prompts`."""
    if not isinstance(part, AblationBefore):
        return None
    harmless = load_harmless(part, protocol, bad_rows)[HARMLESS]
    return Prompts(*(data.encode_prompts(tokenizer, rows, prompt=form) for rows in (harmful, harmless)))


def check(part: NoAblation, architecture: LlamaConfig) -> None:
    """Raises FieldError if the weights of such a model can't be ablated, or for a layer that it lacks."""
    if not isinstance(part, AblationBefore):
        return
    lacking = refusal_ablation.lacks(architecture)
    require(lacking is None, "ablate", part.when,
            f"none: the model has {lacking}, so that what is projected out of weights is not out of the stream")
    layers = architecture.num_layers
    require(part.ablation_layer is None or part.ablation_layer < layers, "ablation_layer", part.ablation_layer,
            f"a number below {layers}, the model's number of layers")
    require(part.ablation_layer is not None or layers > 1, "ablation_layer", part.ablation_layer,
            "a number: a model of one layer has none to choose from")


def find(part: AblationBefore, prompts: Prompts, model: Llama, adapter: Any, frozen: Any) -> Direction:
    """The direction of a model, with its adapter if it has one.

    Raises:
      FieldError: at that layer there is none, or there are too few prompts.
    """
    model = model.clone(microbatch_size=0, attention="xla")
    states = [refusal_ablation.last_states(model, adapter, frozen, of) for of in prompts]
    try:
        return refusal_ablation.find_direction(*states, part.ablation_layer)
    except ValueError as error:
        raise FieldError("ablation_layer", str(error).removeprefix("find_direction: ")) from error


ablate = jax.jit(refusal_ablation.ablate, static_argnums=0)


def record(found: Direction) -> dict[str, Any]:
    """What a run's config.json has of it."""
    return {"layer": int(found.layer), "separations": [round(float(x), 4) for x in found.separations]}
