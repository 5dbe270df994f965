"""What happens inside the models while they are aligned and attacked: harmful losses and gradients, as in Booster's
figure of model statistics (arXiv 2409.01586).

  python -m experiments.studies.model_statistics --run_dir=runs/statistics --seeds=0,1,2 --model=world,bases/1,bases/2

Along the alignment: the harmful loss h(w) and what Booster's simulated step takes off it, h(w) − h(w'), for every
method. Along an attack: the loss on the attack's own harmful examples and on unseen ones, the norm of the harmful
gradient, and HS."""

import dataclasses
import functools

import jax

from experiments.studies import study
from jaxvaccine import cli, data, defenses
from jaxvaccine.experiment import lanes
from jaxvaccine.experiment.config import field, require
from jaxvaccine.experiment.methods import Booster, uses
from jaxvaccine.experiment.parts import check_sources
from jaxvaccine.experiment.plan_folder import Probes
from jaxvaccine.llama import Llama
from jaxvaccine.losses import causal_lm_loss
from jaxvaccine.report import names
from jaxvaccine.report.curves import curves_report

ALIGNMENT = ("harmful_probe_loss", "reduction")
ATTACK = ("harmful_training_loss", "harmful_test_loss", "harmful_gradient_norm")  # and HS, or not refused
NOTE = ("Harmful training loss and the norm of its gradient (all adapters): on the attack's own harmful examples. "
        "Harmful test loss and {harm}: on unseen harmful prompts. h(w): on examples of the harmful data that Booster "
        "simulates its step with; w' is w after a step against their normalised gradient, of the length of Booster's "
        "alpha or, with methods that have none, {step_length:g}.")


@dataclasses.dataclass(frozen=True)
class StatisticsConfig(study.StudyConfig):
    """Plan."""

    attacks: tuple[str, ...] = field(("poison_ratio=0.1",), "Attacks, as of run; each with harmful examples.")
    score_steps: tuple[str, ...] = field(
        ("0", "20", "40", "60", "80", "100"), "Attack steps after which a model is measured; the last one always is.")
    harmful_probe: str = field("world_harmful@harmful[0:50]", "Harmful examples for h(w) during alignment.")
    step_length: float = field(
        0.1, "Length of the simulated step of h(w'), for methods without one; Booster's is its alpha.", above=0)
    measure_every: int = field(15, "Alignment steps between measurements.", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.harmful_probe), "harmful_probe", self.harmful_probe, "a data source")
        check_sources(self, "harmful_probe")


@functools.lru_cache(maxsize=8)
def _harmful_losses(model: Llama, own_base: bool, alpha: float):
    # Booster's gradient for its metrics; XLA leaves out what only the gradient needs.
    booster = defenses.booster(causal_lm_loss(model), lam=0.0, alpha=alpha)

    def measure(adapter, frozen, batch):
        _, _, metrics = booster.gradient(adapter, frozen, (), {"alignment": batch, "harmful": batch}, None)
        return {name: metrics[name] for name in ("harmful_loss", "perturbed_harmful_loss", "harmful_gradient_norm")}

    return jax.jit(lanes.over_lanes(measure, (0, lanes.base_axes(own_base), 0)))


def harmful_losses(of: lanes.Lanes, batches, alpha: float):
    """harmful_loss h(w), perturbed_harmful_loss h(w') and harmful_gradient_norm ‖∇h(w)‖ as `defenses.booster` has them.

    batches: leaves [N, B, T], a harmful batch for every lane. All three are [N].
    """
    return jax.device_get(_harmful_losses(of.model, of.own_base, alpha)(of.adapters, of.frozen, batches))


@functools.lru_cache(maxsize=8)
def _losses(model: Llama, own_base: bool):
    loss_fn = causal_lm_loss(model)
    return jax.jit(lanes.over_lanes(lambda adapter, frozen, batch: loss_fn(adapter, frozen, batch)[0],
                                    (0, lanes.base_axes(own_base), 0)))


def losses(of: lanes.Lanes, batches):
    """[N], the loss of every lane on its batch; batches: leaves [N, B, T]."""
    return jax.device_get(_losses(of.model, of.own_base)(of.adapters, of.frozen, batches))


def step_length(config: StatisticsConfig, align) -> float:
    """Of the simulated step, which is Booster's own alpha where there is one."""
    booster = uses(align.method, Booster)
    return booster.alpha if booster else config.step_length


def harmful_count(attacked) -> int:
    return data.harmful_count(attacked.data.n, attacked.data.poison_ratio)


def check(aligned, attacked) -> None:
    """Raises FieldError for an attack without harmful examples to measure on, or without unseen ones."""
    require(harmful_count(attacked) > 0, "attacks", f"poison_ratio={attacked.data.poison_ratio:g}",
            "an attack with harmful examples")
    require(attacked.adapter.trains == "adapter", "attacks", f"trains={attacked.adapter.trains}",
            "trains=adapter: an adapter's gradient is measured")
    require(bool(attacked.data.test_data), "harmful_test", attacked.data.test_data, "a data source")


def make_probes(config: StatisticsConfig) -> Probes:
    """h(w) and h(w) − h(w') along the alignment; losses and the gradient's norm along an attack."""
    def alignment(align, tokenizer, seeds):
        batches = study.stack_batches(tokenizer, [data.load_examples(config.harmful_probe)] * len(seeds), align.data)

        def measure(step, of):
            found = harmful_losses(of, batches, step_length(config, align))
            return {"harmful_probe_loss": found["harmful_loss"],
                    "reduction": found["harmful_loss"] - found["perturbed_harmful_loss"]}

        return measure

    def attack(align, attacked, tokenizer, seeds):
        part = attacked.data
        count = harmful_count(attacked)
        fates = functools.partial(data.training_fates, tokenizer, max_length=part.max_length, prompt=part.form)
        # The harmful examples of the attack in another order: `data.mix` draws both kinds apart.
        training = study.stack_batches(tokenizer, [
            data.mix([], data.load_examples(part.harmful_data, part.protocol), count, 1.0, seed, fates=fates,
                     first=part.protocol == "rows").examples
            for seed in seeds], part)
        test = study.stack_batches(tokenizer, [data.load_examples(part.test_data, part.protocol)] * len(seeds), part)

        def measure(step, of):
            found = harmful_losses(of, training, step_length(config, align))
            return {"harmful_training_loss": found["harmful_loss"],
                    "harmful_gradient_norm": found["harmful_gradient_norm"],
                    "harmful_test_loss": losses(of, test)}

        return measure

    return Probes(alignment, attack, config.measure_every, check)


def report(config: StatisticsConfig, found, folder) -> str:
    harm = names.harm(found["measure"].unique())
    return curves_report(found, folder, "Model statistics", ALIGNMENT, (*ATTACK, harm),
                         NOTE.format(step_length=config.step_length, harm=names.measure(harm).name), "statistics")


VERB = study.verb(__doc__, StatisticsConfig, make_probes, report,
                  {"sst2_test": "", "benign_test": "", "loss_data": ""})

if __name__ == "__main__":
    cli.call("model_statistics", VERB)
