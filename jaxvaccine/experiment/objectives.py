"""One config per objective of an attacker, with what that objective reads and nothing else, and how it becomes a
gradient estimator.

To add one: a file in jaxvaccine/attacks/, then a dataclass here and a line in OBJECTIVES."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxvaccine import attacks
from jaxvaccine.defenses import Defense
from jaxvaccine.experiment.config import Part, field, library_errors
from jaxvaccine.experiment.methods import Undefended
from jaxvaccine.llama import Llama
from jaxvaccine.losses import causal_lm_loss


class Objective(Part):
    """What an attacker descends.

    `make(model, base, fisher)` is its estimator; base is that of the provider's method, on the layers that train, and
    fisher the aligned adapter's Fisher weights, where it `takes_fisher`. `batches` is what it reads beside the
    provider's. `alone`: it is a training of the attacker's own, beside which the provider's defense has no place.
    """

    batches: ClassVar[tuple[str, ...]] = ()
    takes_fisher: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    # {parameter of the attack: field}, where they have different names.
    renamed: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self):
        super().__post_init__()
        with library_errors(self, self.renamed):
            self.make(None, Undefended().make(None, 1, None), None)

    def harmful_rows(self, batch_size: int) -> int:
        """Rows of its harmful batch, where the user's has so many."""
        return batch_size

    def make(self, model: Llama | None, base: Defense, fisher: Any) -> Defense:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Plain(Objective):
    """Plain fine-tuning."""

    def make(self, model, base, fisher):
        return base


@dataclasses.dataclass(frozen=True)
class OnHarmfulData(Objective):
    """An objective with a harmful batch of its own."""

    batches = ("harmful",)
    alone = True

    objective_batch_size: int = field(
        0, "Rows of the objective's harmful batch, of all of --harmful_data; 0 takes --batch_size.", at_least=0)

    def harmful_rows(self, batch_size):
        return self.objective_batch_size or batch_size


@dataclasses.dataclass(frozen=True)
class Steepen(OnHarmfulData):
    """Steepen."""

    steps: int = field(100, "Steps that undo Booster's flatness; then comes plain fine-tuning.", name="steepen_steps")
    lam: float = field(5.0, "Weight of Booster's regularizer with the other sign.", name="steepen_lam")
    alpha: float = field(0.1, "Length of the simulated harmful step.", name="steepen_alpha")
    exact: bool = field(False, "The regularizer's exact gradient, by a second derivative.", name="steepen_exact")

    def make(self, model, base, fisher):
        return attacks.steepen(causal_lm_loss(model), self.lam, self.alpha, self.steps, base, self.exact)


@dataclasses.dataclass(frozen=True)
class Meta(OnHarmfulData):
    """Meta-attack."""

    weight: float = field(1.0, "Weight of the harmful loss behind a simulated step.", name="meta_weight")
    alpha: float = field(0.1, "Length of the simulated step.", name="meta_alpha")
    exact: bool = field(True, "Differentiate through the step, by a second derivative; else first order.",
                        name="meta_exact")

    def make(self, model, base, fisher):
        return attacks.meta_attack(causal_lm_loss(model), self.weight, self.alpha, base, self.exact)


@dataclasses.dataclass(frozen=True)
class CounterPerturbation(Objective):
    """Counter-perturbation."""

    alone = True

    rho: float = field(2.0, "Norm of the perturbation of activations, against rising loss; below 0 along it, as "
                            "Vaccine's.", name="counter_rho")

    def make(self, model, base, fisher):
        return attacks.counter_perturbation(causal_lm_loss(model), self.rho)


@dataclasses.dataclass(frozen=True)
class Unheld(Objective):
    """Unheld weights."""

    takes_fisher = True

    share: float = field(0.5, "Part of the adapter's weights that trains: those of the least Fisher weights on "
                              "--alignment_data.", name="unheld_share")

    def make(self, model, base, fisher):
        return attacks.unheld(base, self.share, fisher)


OBJECTIVES: dict[str, type[Objective]] = {
    "plain": Plain, "steepen": Steepen, "meta": Meta, "counter_perturbation": CounterPerturbation, "unheld": Unheld}
