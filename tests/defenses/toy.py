"""A loss that is no language model: residual layers, a site after each, everything differentiable twice and more."""

import jax
import jax.numpy as jnp
import numpy as np

L, B, D = 4, 3, 5
RATE = 0.3  # of dropout


def loss_fn(adapter, frozen, batch, perturbations=None, key=None):
    """½ mean squared error of h_{l+1} = h_l + tanh(h_l (W_l + A_l) + b_l) + e_l; e is [layers, B, D]."""
    shape = (len(frozen), *batch["x"].shape)
    perturbed = jnp.zeros(shape, batch["x"].dtype) if perturbations is None else perturbations["site"]
    keep = jnp.ones(shape) if key is None else jax.random.bernoulli(key, 1 - RATE, shape)

    def layer(h, of):
        w, a, b, e, keep = of
        h = h * keep
        return h + jnp.tanh(h @ (w + a) + b) + e, None

    h, _ = jax.lax.scan(layer, batch["x"], (frozen, adapter["a"], adapter["b"], perturbed, keep))
    return 0.5 * jnp.mean((h - batch["y"]) ** 2), {"perturbations": {"site": perturbed}}


def trees(seed=0, layers=L):
    """(adapter, frozen)."""
    rng = np.random.default_rng(seed)
    a, b, frozen = rng.normal(size=(layers, D, D)), rng.normal(size=(layers, D)), rng.normal(size=(layers, D, D))
    return {"a": jnp.asarray(a) / 4, "b": jnp.asarray(b) / 4}, jnp.asarray(frozen) / 2


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {"x": jnp.asarray(rng.normal(size=(B, D))), "y": jnp.asarray(rng.normal(size=(B, D)))}


def batches(seed=0):
    return {"alignment": batch(seed), "harmful": batch(1000 + seed)}


def run(defense, steps, adapter=None, seed=0):
    """[(grads, state, metrics)] of `steps` jitted gradients at the same adapter, a batch and a key a step."""
    start, frozen = trees()
    adapter = start if adapter is None else adapter
    gradient, state, out = jax.jit(defense.gradient), defense.init(adapter), []
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(seed), step)
        grads, state, metrics = gradient(adapter, frozen, state, batches(step), key)
        out.append((grads, state, metrics))
    return out


def in_blocks(adapter):
    """The adapter as a language model's: its matrices are the attention's, its biases the MLP's."""
    return {"layers": {"attention": {"a": adapter["a"]}, "mlp": {"b": adapter["b"]}}}


def in_mlp(adapter):
    """Of an adapter `in_blocks`, as `llama.in_mlp` of a language model's; a prefix of the tree."""
    return {"layers": {"attention": False, "mlp": True}}


def blocks_loss(adapter, frozen, batch, perturbations=None, key=None):
    """loss_fn of an adapter `in_blocks`."""
    adapter = adapter["layers"]
    return loss_fn({"a": adapter["attention"]["a"], "b": adapter["mlp"]["b"]}, frozen, batch, perturbations, key)


def blocks_no_dropout(adapter, frozen, batch, perturbations=None, key=None):
    del key
    return blocks_loss(adapter, frozen, batch, perturbations)


def no_dropout(adapter, frozen, batch, perturbations=None, key=None):
    del key
    return loss_fn(adapter, frozen, batch, perturbations)
