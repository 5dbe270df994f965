"""One config per method, with what that method reads and nothing else, and how it becomes a `Defense`.

To add a defense: its paper's file in jaxvaccine/defenses/, then a dataclass here and a line in ALIGNMENT or
FINE_TUNING."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import optax

from jaxvaccine import defenses
from jaxvaccine.activation_losses import loss_and_hidden_distance, noise_and_ascent
from jaxvaccine.attacks import all_weights
from jaxvaccine.defenses import Defense
from jaxvaccine.defenses.base import LossFn, ReferenceLossFn
from jaxvaccine.experiment.config import Part, choice, field, library_errors
from jaxvaccine.llama import Llama, in_mlp
from jaxvaccine.losses import causal_lm_loss, loss_and_kl, negative_entropy


class AlignmentMethod(Part):
    """A method of the alignment stage.

    `make(model)` is its `Defense`, `batches` what it reads: "alignment" and of "harmful", "harmless", "adversary" what
    it needs. `continues`: its simulated steps are the aligned adapter's, so that an attack is to train that one on.
    Hyper-parameters are checked where they are documented, in jaxvaccine/defenses, when the config is made.
    """

    batches: ClassVar[tuple[str, ...]] = ("alignment",)
    continues: ClassVar[bool] = False
    # {parameter of the defense: field}, where they have different names.
    renamed: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self):
        super().__post_init__()
        with library_errors(self, self.renamed):
            self.make(None)

    def make(self, model: Llama | None) -> Defense:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Sft(AlignmentMethod):
    """SFT."""

    def make(self, model):
        return defenses.sft(causal_lm_loss(model))


@dataclasses.dataclass(frozen=True)
class Vaccine(AlignmentMethod):
    """Vaccine."""

    rho: float = field(2.0, "Norm of the perturbation.")
    direction: Literal["gradient", "gaussian"] = field(
        "gradient", "The perturbation, or (ablation) Gaussian noise of the same norm.")

    def make(self, model):
        return defenses.vaccine(causal_lm_loss(model), self.rho, self.direction)


@dataclasses.dataclass(frozen=True)
class TVaccine(AlignmentMethod):
    """T-Vaccine."""

    rho: float = field(3.0, "Norm of the perturbation.")
    layers: int = field(8, "S, how many layers are active.")
    sample_every: int = field(20, "J, steps between draws of the active layers.")
    probe_every: int = field(200, "K, steps between probes of the layers' harmful gradients.")
    freeze: Literal["layer", "released"] = field(
        "layer", "What is frozen: the other layers whole (the paper), or what the authors' program freezes.")
    importance: Literal["harmful", "alignment", "uniform"] = field(
        "harmful", "From whose gradients layers get their probabilities; the others are ablations.")
    draw: Literal["sample", "top"] = field("sample", "Active layers are drawn, or (ablation) the most probable.")
    direction: Literal["gradient", "gaussian"] = field(
        "gradient", "The perturbation, or (ablation) Gaussian noise of the same norm.")

    @property
    def batches(self):
        return ("alignment", "harmful") if self.importance == "harmful" else ("alignment",)

    def make(self, model):
        return defenses.t_vaccine(
            causal_lm_loss(model), self.rho, self.layers, self.sample_every, self.probe_every, freeze=self.freeze,
            importance=self.importance, draw=self.draw, direction=self.direction, in_mlp=in_mlp)


@dataclasses.dataclass(frozen=True)
class RepNoise(AlignmentMethod):
    """RepNoise."""

    batches = ("alignment", "harmful", "harmless")
    renamed: ClassVar[Mapping[str, str]] = {"alpha": "ascent_weight", "beta": "noise_weight"}

    ascent_weight: float = field(1.0, "alpha, weight of the harmful loss's logarithm.")
    noise_weight: float = field(0.001, "beta, weight of the distance from noise.")

    def make(self, model):
        return defenses.repnoise(causal_lm_loss(model), noise_and_ascent(model), self.ascent_weight, self.noise_weight)


@dataclasses.dataclass(frozen=True)
class Tar(AlignmentMethod):
    """TAR."""

    batches = ("alignment", "harmful", "adversary")
    continues = True

    inner_steps: int = field(4, "k, steps of the simulated attack.")
    inner_learning_rate: float = field(5e-4, "Learning rate of the simulated attack.", at_least=0)
    adversary: Literal["adamw", "sgd"] = field("adamw", "Optimizer of the simulated attack.")
    tamper_weight: float = field(4.0, "Weight of the tamper-resistance loss after the attack.")
    retain_weight: float = field(1.0, "Weight of the alignment loss and the hidden states' distance.")

    def optimizer(self) -> optax.GradientTransformation:
        """Of the simulated attack; AdamW with PyTorch's weight decay."""
        if self.adversary == "sgd":
            return optax.sgd(self.inner_learning_rate)
        return optax.adamw(self.inner_learning_rate, weight_decay=0.01)

    def make(self, model):
        return defenses.tar(
            causal_lm_loss(model), negative_entropy(model), loss_and_hidden_distance(model), self.optimizer(),
            self.inner_steps, self.tamper_weight, self.retain_weight)


# What Booster can stand on.
BASES: dict[str, type[AlignmentMethod]] = {
    "sft": Sft, "vaccine": Vaccine, "t_vaccine": TVaccine, "repnoise": RepNoise, "tar": Tar}


@dataclasses.dataclass(frozen=True)
class Booster(AlignmentMethod):
    """Booster."""

    continues = True

    lam: float = field(5.0, "Weight of the regularizer.")
    alpha: float = field(0.1, "Length of the simulated harmful step.")
    exact: bool = field(False, "The exact gradient of the regularizer, by a second derivative.")
    last_term: bool = field(True, "The gradient's last term, −∇h(w'); without, harmful loss is lowered: an ablation.")
    base: AlignmentMethod = choice(
        "base_defense", BASES, "sft", "Whose gradient stands in the place of the alignment loss's.")

    @property
    def batches(self):
        return tuple(dict.fromkeys(("alignment", "harmful", *self.base.batches)))

    def make(self, model):
        return defenses.booster(
            causal_lm_loss(model), self.lam, self.alpha, base=self.base.make(model), exact=self.exact,
            last_term=self.last_term)


ALIGNMENT: dict[str, type[AlignmentMethod]] = {
    "sft": Sft, "vaccine": Vaccine, "t_vaccine": TVaccine, "booster": Booster, "repnoise": RepNoise, "tar": Tar}


def uses(method: AlignmentMethod, kind: type) -> Any:
    """The method or Booster's base, whichever is of this kind; None if neither is."""
    return next((m for m in (method, getattr(method, "base", None)) if isinstance(m, kind)), None)


class Losses(NamedTuple):
    """Of a model, as functions of what trains: makers of the loss, and of the loss with the divergence from a start."""

    causal_lm: Callable[[Llama | None], LossFn]
    and_kl: Callable[[Llama | None], ReferenceLossFn]


OF_ADAPTERS = Losses(lambda model: causal_lm_loss(model), lambda model: loss_and_kl(model))
OF_ALL_WEIGHTS = Losses(all_weights.causal_lm_loss, all_weights.loss_and_kl)


class TuningMethod(Part):
    """A provider's method while a user fine-tunes.

    `make(model, steps, fisher)` is its `Defense` in a run of so many steps; fisher are weights that it takes on
    alignment data before the first, where it `takes_fisher`. `batches` is what a step reads, `continues` whether it
    holds the aligned adapter, which then has to train on, `reads_steps` whether steps make a difference: where they
    don't, runs of any length share a compiled step. One that `takes_losses` is made with the `Losses` of whatever
    trains as a fourth argument, and so for all weights too."""

    batches: ClassVar[tuple[str, ...]] = ("user",)
    continues: ClassVar[bool] = False
    takes_fisher: ClassVar[bool] = False
    takes_losses: ClassVar[bool] = False
    reads_steps: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        with library_errors(self):
            self.make(None, 1, None)

    def make(self, model: Llama | None, steps: int, fisher: Any) -> Defense:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Undefended(TuningMethod):
    """No defense."""

    takes_losses = True
    reads_steps = False

    def make(self, model, steps, fisher, losses=OF_ADAPTERS):
        return defenses.sft(losses.causal_lm(model), batch="user")


@dataclasses.dataclass(frozen=True)
class Lisa(TuningMethod):
    """Lisa."""

    batches = ("user", "alignment")
    takes_losses = True
    # The proximal term acts after this part of all steps, as in the authors' program.
    START: ClassVar[float] = 0.1

    alignment_steps: int = field(100, "K1, steps of a phase on alignment data.", name="lisa_alignment_steps")
    user_steps: int = field(900, "K2, steps of a phase on the user's data.", name="lisa_user_steps")
    rho: float = field(1.0, "Weight of the proximal term.", name="lisa_rho")

    def make(self, model, steps, fisher, losses=OF_ADAPTERS):
        return defenses.lisa(
            losses.causal_lm(model), self.alignment_steps, self.user_steps, self.rho, self.START * steps)


@dataclasses.dataclass(frozen=True)
class Ewc(TuningMethod):
    """EWC."""

    continues = True
    reads_steps = False
    takes_fisher = True

    lam: float = field(1e9, "Weight of the penalty.", name="ewc_lam")

    def make(self, model, steps, fisher):
        return defenses.ewc(causal_lm_loss(model), self.lam, fisher)


@dataclasses.dataclass(frozen=True)
class Kl(TuningMethod):
    """KL."""

    takes_losses = True
    reads_steps = False

    lam: float = field(0.1, "Weight of the divergence from the aligned model.", name="kl_lam")

    def make(self, model, steps, fisher, losses=OF_ADAPTERS):
        return defenses.kl(losses.and_kl(model), self.lam)


FINE_TUNING: dict[str, type[TuningMethod]] = {"none": Undefended, "lisa": Lisa, "ewc": Ewc, "kl": Kl}
