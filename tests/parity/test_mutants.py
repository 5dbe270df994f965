"""Plausible mistakes, each made on purpose by a small patch: the comparison with PyTorch must catch every one.

Mistakes in how layers are drawn are those of tests/defenses/test_sampling.py: both sides train the layers that
jaxvaccine drew.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import optax
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from experiments.parity import steps as parity
from jaxvaccine import activation_losses, defenses, llama, losses, optim, training
from jaxvaccine.defenses import base
from jaxvaccine.experiment import methods
from jaxvaccine.llama_config import LoraConfig
from tests.parity import suite

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("float64", "quick_compile", "one_torch_thread")]

# Six steps, with a new draw in each and p taken twice; few projections, which compile sooner.
FLAGS = {"steps": 6, "seed": 1, "clip_norm": 0.1, "targets": ("q_proj", "o_proj", "up_proj")}
T_VACCINE = {"layers": 1, "sample_every": 1, "probe_every": 4}
# The package's names `vaccine`, `booster`, ... are the functions.
vaccine, t_vaccine, booster = (
    importlib.import_module(f"jaxvaccine.defenses.{name}") for name in ("vaccine", "t_vaccine", "booster"))


def other_activations(change):
    """llama.layer_activations with change(model, frozen, activations)."""
    def patch(monkeypatch):
        original = llama.layer_activations

        def mutant(model, adapter, frozen, *args, **kwargs):
            return change(model, frozen, original(model, adapter, frozen, *args, **kwargs))

        monkeypatch.setattr(llama, "layer_activations", mutant)
    return patch


def joint_norm(tree):
    return jnp.sqrt(base.squared_norm(tree))


def wrap_defense(name, gradient):
    """defenses.<name>, with gradient(original defense's gradient, adapter, frozen, state, batches, key)."""
    def patch(monkeypatch):
        make = getattr(defenses, name)

        def mutant(*args, **kwargs):
            original = make(*args, **kwargs)
            return original._replace(gradient=lambda *a: gradient(original.gradient, *a))

        monkeypatch.setattr(defenses, name, mutant)
    return patch


def wrap_loss(change):
    """causal_lm_loss(model), with change(loss_fn, model, adapter, frozen, batch, perturbations) -> loss."""
    def patch(monkeypatch):
        def mutant(model):
            loss_fn = losses.causal_lm_loss(model)

            def mutated(adapter, frozen, batch, perturbations=None, key=None):
                none = llama.zero_perturbations(model, *batch["input_ids"].shape)
                perturbations = none if perturbations is None else perturbations
                return change(loss_fn, adapter, frozen, batch, perturbations), {"perturbations": perturbations}
            return mutated

        monkeypatch.setattr(methods, "causal_lm_loss", mutant)
    return patch


def replace(owner, name, value):
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def mean_over_rows(loss_fn, adapter, frozen, batch, perturbations):
    rows = range(batch["input_ids"].shape[0])
    return sum(loss_fn(adapter, frozen, {name: x[i:i + 1] for name, x in batch.items()},
                       jax.tree.map(lambda x, i=i: x[:, i:i + 1], perturbations))[0] for i in rows) / len(rows)


def mean_over_all_positions(loss_fn, adapter, frozen, batch, perturbations):
    loss, aux = loss_fn(adapter, frozen, batch, perturbations)
    return loss * aux["tokens"] / batch["attention_mask"].sum()


def unshifted_labels(monkeypatch):
    monkeypatch.setattr(losses, "supervised_targets", lambda labels: (labels, labels != losses.IGNORED))


def layer_output_perturbed(monkeypatch):
    """After the layer's last residual add: the sum is the same as with the MLP's output perturbed."""
    class PerturbedMLP(llama.MLP):
        def __call__(self, x):
            return llama.perturb(self, "output", super().__call__(x))

    def zeros(model, batch, length, original=llama.zero_perturbations):
        return {"layers": {"mlp": original(model, batch, length)["layers"]["attention"]}}

    monkeypatch.setattr(llama, "MLP", PerturbedMLP)
    monkeypatch.setattr(losses.llama, "zero_perturbations", zeros)


def before_o_proj_perturbed(monkeypatch):
    """The heads' outputs instead of the projection's; of the same size in this model."""
    class PerturbedProjection(llama.LoraDense):
        def __call__(self, x):
            return super().__call__(llama.perturb(self, "output", x) if self.name == "o_proj" else x)

    def zeros(model, batch, length, original=llama.zero_perturbations):
        return {"layers": {"attention": {"o_proj": original(model, batch, length)["layers"]["attention"]}}}

    monkeypatch.setattr(llama, "LoraDense", PerturbedProjection)
    monkeypatch.setattr(losses.llama, "zero_perturbations", zeros)


def interleaved_rope(monkeypatch):
    def rotate(x, rope):
        cos, sin = rope
        first, second = x[..., ::2], x[..., 1::2]
        return jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)

    monkeypatch.setattr(llama, "rotate", rotate)


def wrap_layer_masked(update):
    """layer_masked, with update(original update, updates, state, params, mask)."""
    def patch(monkeypatch):
        original = optim.layer_masked

        def mutant(inner):
            transformation = original(inner)
            return optax.GradientTransformationExtraArgs(
                transformation.init, lambda updates, state, params=None, *, trainable=None, **extra_args: update(
                    transformation.update, updates, state, params, trainable))
        monkeypatch.setattr(optim, "layer_masked", mutant)
    return patch


def moving_state(of_counts):
    """Step counts, or else moments, of frozen layers move on as if their gradients were 0."""
    def update(original, updates, state, params, mask):
        new_updates, kept = original(updates, state, params, trainable=mask)
        _, moved = original(updates, state, params)
        return new_updates, jax.tree.map(
            lambda k, m: m if jnp.issubdtype(k.dtype, jnp.integer) == of_counts else k, kept, moved)
    return update


def decay_of_frozen_layers(original, updates, state, params, mask):
    new_updates, state = original(updates, state, params, trainable=mask)
    decay = jax.tree.map(lambda w: suite.tiny_config("sft").training.weight_decay * w, params)
    active = base.mask_layers(mask, decay)
    return jax.tree.map(lambda u, d, a: u + d - a, new_updates, decay, active), state


def without_the_steps_restoring(patch):
    """The step restores what is frozen, whatever the optimizer does: with it, such a mistake of one is none."""
    def both(monkeypatch):
        monkeypatch.setattr(training, "select_layers", lambda masks, tree, other: tree)
        patch(monkeypatch)
    return both


def l2_in_the_gradient(monkeypatch):
    adam, decay = optax.scale_by_adam, optax.add_decayed_weights
    monkeypatch.setattr(optax, "scale_by_adam", optax.identity)
    monkeypatch.setattr(optax, "add_decayed_weights", lambda weight: optax.chain(decay(weight), adam()))


def schedule_one_step_ahead(monkeypatch):
    original = optim.learning_rate_schedule
    monkeypatch.setattr(optim, "learning_rate_schedule",
                        lambda config, steps: lambda step: original(config, steps)(step + 1))


def clip_leaf_by_leaf(max_norm):
    clip = optim.optax.clip_by_global_norm(max_norm)
    return optax.GradientTransformation(
        clip.init, lambda updates, state, params=None: (
            jax.tree.map(lambda g: clip.update(g, state)[0], updates), state))


def booster_from(combine):
    """booster whose gradient is combine(∇f, lam · (∇h(w) − ∇h(w'))), from Booster with and without its term."""
    def patch(monkeypatch):
        make = defenses.booster

        def mutant(loss_fn, lam, alpha, **given):
            original, plain = (make(loss_fn, weight, alpha, **given) for weight in (lam, 0.0))

            def gradient(*args):
                grads, state, metrics = original.gradient(*args)
                f, _, _ = plain.gradient(*args)
                term = jax.tree.map(jnp.subtract, grads, f)
                return jax.tree.map(jnp.add, *combine(f, term)), state, metrics
            return original._replace(gradient=gradient)

        monkeypatch.setattr(defenses, "booster", mutant)
    return patch


def clip(tree):
    return jax.tree.map(lambda g: g * jnp.minimum(1, FLAGS["clip_norm"] / joint_norm(tree)), tree)


def probe_on_alignment_data(original, adapter, frozen, state, batches, key):
    return original(adapter, frozen, state, {**batches, "harmful": batches["alignment"]}, key)


def both_passes_gradients(original, adapter, frozen, state, batches, key):
    grads, state, metrics = original(adapter, frozen, state, batches, key)
    lora = suite.tiny_config("vaccine", **FLAGS).adapter.lora()
    model = llama.Llama(parity.TINY, lora, dtype=jnp.float64, remat="none")
    loss_fn = losses.causal_lm_loss(model)
    first = jax.grad(lambda w: loss_fn(w, frozen, batches["alignment"])[0])(adapter)
    return jax.tree.map(jnp.add, grads, first), state, metrics


MUTANTS = {
    # Vaccine and T-Vaccine
    "a norm per layer instead of a joint one": ("vaccine", replace(
        vaccine, "global_norm", lambda tree: jnp.sqrt(base.squared_norm(tree, 1)).reshape(-1, 1, 1, 1))),
    "a norm per row": ("vaccine", replace(vaccine, "global_norm", lambda tree: jnp.sqrt(sum(
        jnp.sum(x * x, (0, 2, 3), keepdims=True) for x in jax.tree.leaves(tree))))),
    "perturbing after the residual add": ("vaccine", layer_output_perturbed),
    "perturbing before o_proj": ("vaccine", before_o_proj_perturbed),
    "Vaccine's normalisation left out": ("vaccine", replace(vaccine, "global_norm", lambda tree: jnp.ones(()))),
    "epsilon under the root": ("vaccine", replace(
        vaccine, "global_norm", lambda tree: jnp.sqrt(base.squared_norm(tree) + 1e-7) - 1e-7)),
    "epsilon left out": ("vaccine", replace(vaccine, "NORM_EPSILON", 0.0)),
    "a perturbation downhill": ("vaccine", replace(vaccine, "global_norm", lambda tree: -joint_norm(tree))),
    "the gradients of both passes": ("vaccine", wrap_defense("vaccine", both_passes_gradients)),
    "perturbing and norm over all layers": ("t_vaccine", replace(t_vaccine, "ActiveLayers", lambda mask, count: None)),
    "the alignment gradient for p": ("t_vaccine", wrap_defense("t_vaccine", probe_on_alignment_data)),
    "p from squared norms": ("t_vaccine", replace(
        t_vaccine, "site_norms", lambda *args: vaccine.site_norms(*args) ** 2)),
    "the released freezing for the paper's": ("t_vaccine", lambda monkeypatch: monkeypatch.setattr(
        defenses, "t_vaccine", lambda *args, make=defenses.t_vaccine, **more: make(
            *args, **{**more, "freeze": "released"}))),
    "the paper's freezing for the released": ("t_vaccine_released", lambda monkeypatch: monkeypatch.setattr(
        defenses, "t_vaccine", lambda *args, make=defenses.t_vaccine, **more: make(
            *args, **{**more, "freeze": "layer"}))),
    "MLP adapters that are never frozen": ("t_vaccine_released", lambda monkeypatch: monkeypatch.setattr(
        t_vaccine, "released_masks", lambda active, in_mlp: jax.tree.map(
            lambda mlp: jnp.ones_like(active) if mlp else active, in_mlp))),
    # Booster
    "the sign of the regularizer": ("booster", booster_from(lambda f, term: (f, jax.tree.map(jnp.negative, term)))),
    "clipping before the sum": ("booster", booster_from(lambda f, term: (clip(f), clip(term)))),
    "a simulated step uphill": ("booster", replace(booster, "_step", lambda adapter, factor, grads: jax.tree.map(
        lambda w, g: w + factor * g, adapter, grads))),
    "a simulated step that is not normalised": ("booster", replace(booster, "global_norm", lambda tree: jnp.ones(()))),
    "a simulated step of the frozen layers too": ("t_vaccine_booster", replace(
        booster, "mask_layers", lambda masks, tree: tree)),
    "Booster's epsilon left out": ("booster", replace(booster, "NORM_EPSILON", 0.0)),
    # RepNoise
    "the mask left out": ("repnoise", replace(
        activation_losses, "differing_tokens", lambda harmful, harmless: harmful["labels"] != losses.IGNORED)),
    "one kernel": ("repnoise", replace(activation_losses, "BANDWIDTHS", (1.0,))),
    "the last hidden state normed twice": ("repnoise", other_activations(
        lambda model, frozen, a: a._replace(
            final=model.apply({"params": frozen}, a.final, method=lambda module, x: module.norm(x))))),
    "the residual stream instead of the MLPs' outputs": ("repnoise", other_activations(
        lambda model, frozen, a: a._replace(mlp=a.inputs))),
    # TAR
    "the tamper-resistance gradient before the attack": ("tar", replace(
        methods.Tar, "optimizer", lambda self: optax.sgd(0.0))),
    "the tamper-resistance gradient lost": ("tar", lambda monkeypatch: monkeypatch.setattr(
        defenses, "tar", functools.partial(lambda make, *args: make(*args[:-2], 0.0, args[-1]), defenses.tar))),
    # Loss and model
    "the mean over rows instead of tokens": ("sft", wrap_loss(mean_over_rows)),
    "the mean over all positions": ("sft", wrap_loss(mean_over_all_positions)),
    "labels that are not shifted": ("sft", unshifted_labels),
    "alpha not divided by the rank": ("sft", replace(LoraConfig, "scale", property(lambda self: self.alpha))),
    "RoPE of neighbouring pairs": ("sft", interleaved_rope),
    # Optimizer
    "one step count for all layers": ("t_vaccine", wrap_layer_masked(moving_state(of_counts=True))),
    "moments that move while frozen": ("t_vaccine", wrap_layer_masked(moving_state(of_counts=False))),
    "decay on frozen layers": ("t_vaccine", without_the_steps_restoring(wrap_layer_masked(decay_of_frozen_layers))),
    "decay as L2 in the gradient": ("sft", l2_in_the_gradient),
    "a schedule one step ahead": ("sft", schedule_one_step_ahead),
    "clipping leaf by leaf": ("sft", replace(optim, "clip_by_global_norm", clip_leaf_by_leaf)),
    "clipping without its 1e-6": ("sft", replace(optim, "clip_by_global_norm", optax.clip_by_global_norm)),
}


def problem(method, tiny_dir):
    return suite.tiny_problem(tiny_dir, method, "float64", **FLAGS, **(T_VACCINE if "t_vaccine" in method else {}))


@pytest.mark.parametrize("method", sorted({method for method, _ in MUTANTS.values()}))
def test_without_a_mistake(method, tiny_dir):
    suite.check(problem(method, tiny_dir), suite.FLOAT64)


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_is_caught(mistake, tiny_dir, monkeypatch):
    method, patch = MUTANTS[mistake]
    right = problem(method, tiny_dir)
    patch(monkeypatch)
    with pytest.raises(AssertionError, match="jaxvaccine and PyTorch differ by"):
        suite.check(right, suite.FLOAT64)
