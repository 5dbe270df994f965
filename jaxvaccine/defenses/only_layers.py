"""Training of some layers alone, whatever the method."""

import jax
import jax.numpy as jnp

from jaxvaccine.defenses.base import Defense, both_train, mask_layers


def only_layers(defense: Defense, layers) -> Defense:
    """The defense, with the adapters of all other layers frozen whole: no gradient, no decay, no moments.

    State and metrics are the defense's own. Booster is told by its base, `booster(loss_fn, base=only_layers(...))`, so
    that its simulated step is one of these layers too; around Booster, that step still moves all layers.

    Args:
      defense: any.
      layers: [L] bool, true where a layer trains; may be traced. What the defense freezes itself stays frozen.
    """
    layers = jnp.asarray(layers)
    if layers.ndim != 1 or layers.dtype != bool:
        raise ValueError(f"only_layers: layers: found {layers.dtype} {list(layers.shape)}, expected bool [L]")

    def init(adapter):
        total = jax.tree.leaves(adapter)[0].shape[0]
        if len(layers) != total:
            raise ValueError(f"only_layers: layers: found {len(layers)}, expected one for each of the {total} layers")
        return defense.init(adapter)

    def gradient(adapter, frozen, state, batches, key):
        grads, state, metrics = defense.gradient(adapter, frozen, state, batches, key)
        return mask_layers(layers, grads), state, metrics

    def trainable(state, adapter):
        own = defense.trainable(state, adapter)
        return layers if own is None else both_train(own, layers)

    return defense._replace(init=init, gradient=gradient, trainable=trainable)
