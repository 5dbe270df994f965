"""Which layers an attack needs, and whether the harmful gradient's norm tells: the assumption that T-Vaccine draws by.

  python -m experiments.studies.criticality --run_dir=runs/criticality --seeds=0,1,2 --model=world,bases/1,bases/2

Along the alignment the norms ‖∇_{a_l} h‖ of T-Vaccine's probe are taken, by layer. Then the aligned model is attacked
on one layer alone (only) or on all layers but one (all_but), every layer in turn; what such an attack reaches is the
layer's effect, and the report has its rank correlation with the norms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies import study
from jaxvaccine import cli, data
from jaxvaccine.defenses.base import squared_norm
from jaxvaccine.defenses.vaccine import activation_gradient
from jaxvaccine.experiment import lanes, stage
from jaxvaccine.experiment.config import field, require
from jaxvaccine.experiment.plan_folder import Probes
from jaxvaccine.experiment.plans import Plan
from jaxvaccine.llama import Llama
from jaxvaccine.losses import causal_lm_loss
from jaxvaccine.report.layers import layers_report

KINDS = ("only", "all_but")


@dataclasses.dataclass(frozen=True)
class CriticalityConfig(study.StudyConfig):
    """Plan."""

    defenses: tuple[str, ...] = field(("sft",), "How the attacked models are aligned, as of run.")
    # A single layer's adapter is a small one: at the small world's own learning rate most layers reach nothing.
    attacks: tuple[str, ...] = field(
        ("only:learning_rate=1e-3:steps=60",), "only or all_but, with what differs from the flags attack_….")
    score_steps: tuple[str, ...] = field(
        ("10", "20", "30", "40", "50", "60"), "Attack steps after which a model is scored; the last one always is.")
    measure_every: int = field(10, "Alignment steps between measurements of the norms.", at_least=1)

    def make_plan(self) -> Plan:
        num_layers = stage.read_architecture(self.model[0]).num_layers
        for backbone in self.model:
            found = stage.read_architecture(backbone).num_layers
            require(found == num_layers, "model", f"{backbone} with {found} layers",
                    f"{num_layers} as in {self.model[0]}, so that layers can be compared")
        attacks = [layer_attack(text, layer, num_layers) for text in self.attacks for layer in range(num_layers)]
        return Plan.product(self.model, self.methods, attacks, [int(seed) for seed in self.seeds],
                            [int(step) for step in self.score_steps])


def layer_attack(text: str, layer: int, num_layers: int) -> str:
    """An attack of `run` for "kind:name=value:…" and a layer."""
    kind, _, changes = text.partition(":")
    require(kind in KINDS, "attacks", text, f"it to begin with one of {', '.join(KINDS)}")
    require("only_layers=" not in changes, "attacks", text, "no only_layers: each layer has its turn")
    layers = [i for i in range(num_layers) if (i == layer) == (kind == "only")]
    return ":".join(filter(None, (changes, "only_layers=" + "+".join(map(str, layers)))))


@functools.lru_cache(maxsize=8)
def _layer_norms(model: Llama, own_base: bool):
    loss_fn = causal_lm_loss(model)

    def measure(adapter, frozen, batch):
        _, sites = activation_gradient(loss_fn, adapter, frozen, batch, None)
        grads = jax.grad(loss_fn, has_aux=True)(adapter, frozen, batch)[0]
        return {name: jnp.sqrt(squared_norm(tree, first_axis=1))
                for name, tree in (("activation_gradient_norm", sites), ("weight_gradient_norm", grads))}

    return jax.jit(lanes.over_lanes(measure, (0, lanes.base_axes(own_base), 0)))


def measure_norms(config, tokenizer, seeds):
    """(step, lanes) -> {norm: [N, L]}: ‖∇_{a_l} h‖ as T-Vaccine's probe takes it, and ‖∇_{w_l} h‖ of the layer's
    adapter.

    On the harmful batch that T-Vaccine would probe with after that step, without dropout.
    """
    tokenized = data.tokenize_examples(
        tokenizer, data.load_examples(config.data.harmful_data, config.data.data_protocol), config.data.max_length,
        config.data.form)
    streams = [data.training_batches({"harmful": (tokenized, config.data.harmful_batch_size)}, seed, config.data.bucket)
               for seed in seeds]

    def measure(step: int, of: lanes.Lanes):
        batches = [stream(step)["harmful"] for stream in streams]
        stacked = {name: np.stack([b[name] for b in batches]) for name in batches[0]}
        return jax.device_get(_layer_norms(of.model, of.own_base)(of.adapters, of.frozen, stacked))

    return measure


def check(aligned, attacked) -> None:
    """Raises FieldError for a cell without harmful examples to take norms on, or without an HS."""
    require(bool(aligned.data.harmful_data), "harmful_data", aligned.data.harmful_data, "a data source")
    require(bool(attacked.data.test_data), "harmful_test", attacked.data.test_data, "a data source")


def report(config: CriticalityConfig, found, folder) -> str:
    return layers_report(found, folder)


VERB = study.verb(__doc__, CriticalityConfig, lambda config: Probes(
    measure_norms, every=config.measure_every, check=check), report, {"benign_test": "", "loss_data": ""})

if __name__ == "__main__":
    cli.call("criticality", VERB)
