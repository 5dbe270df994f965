"""TAR: tamper-resistant safeguards by first-order meta-learning (arXiv 2408.00761)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.defenses.base import (
    Defense,
    LossFn,
    ReferenceLossFn,
    Tree,
    after,
    check_not_negative,
    check_positive,
    loss_gradient,
    split_key,
    take_batch,
)


class TarState(NamedTuple):
    """What the hidden states are held to."""

    start: Tree  # the adapter that training starts from


def tar(
    loss_fn: LossFn, tamper_loss_fn: LossFn, retain_fn: ReferenceLossFn, adversary: Any, inner_steps: int = 4,
    tamper_weight: float = 4.0, retain_weight: float = 1.0,
) -> Defense:
    """tamper_weight · ∇t(w') + retain_weight · ∇(r(w) + d(w, s)) (TAR, Algorithm 1), with one attack per step.

    w' is where an adversary gets from w in k optimizer steps on harmful data; t, the tamper-resistance loss, is taken
    there, and its gradient is applied at w as if w' = w + constant (first-order meta-learning, as the paper has it).
    r is the loss on the data to be retained, d the distance of the hidden states from those of s, the adapter that
    training starts from. (The authors' program also takes ∇t along the attack, and draws among several kinds of
    adversaries and learning rates.)

    Args:
      loss_fn: the adversary's loss (`base.LossFn`).
      tamper_loss_fn: t, as loss_fn; the paper's is `losses.negative_entropy` on harmful data.
      retain_fn: r and d, such as `activation_losses.loss_and_hidden_distance` (`base.ReferenceLossFn`).
      adversary: the attack's optimizer, an Optax transformation such as `optax.sgd(1e-2)`, fresh in every step.
      inner_steps: k.
      tamper_weight: the authors run 4.
      retain_weight: of r + d.

    Returns:
      A defense with state `TarState`. It needs the batches "alignment" (what is retained), "harmful" (for t) and
      "adversary", k batches one below the other, of each of which every step of the attack takes one. Metrics: loss r,
      hidden_distance d, tamper_loss t, adversary_loss and attacked_adversary_loss, those of the first and the last step
      of the attack, before they are made.

    Raises:
      ValueError: an argument is out of range; by gradient, if the rows of "adversary" can't be dealt out evenly.
    """
    check_positive("tar", inner_steps=inner_steps)
    check_not_negative("tar", tamper_weight=tamper_weight, retain_weight=retain_weight)

    def attack(adapter, frozen, batch, key):
        rows = jax.tree.leaves(batch)[0].shape[0]
        if rows % inner_steps:
            raise ValueError(f"tar: batches['adversary']: found {rows} rows, expected a multiple of the {inner_steps} "
                             "steps of the attack")

        def step(carry, of):
            adapter, state = carry
            step_batch, i = of
            step_key = None if key is None else jax.random.fold_in(key, i)
            loss, grads = loss_gradient(loss_fn, adapter, frozen, step_batch, key=step_key)
            updates, state = adversary.update(grads, state, adapter)
            return (jax.tree.map(lambda w, u: w + u.astype(w.dtype), adapter, updates), state), loss

        batches = jax.tree.map(lambda x: x.reshape(inner_steps, rows // inner_steps, *x.shape[1:]), batch)
        (attacked, _), losses = jax.lax.scan(
            step, (adapter, adversary.init(adapter)), (batches, jnp.arange(inner_steps)))
        return attacked, losses

    def gradient(adapter, frozen, state: TarState, batches, key):
        retained, harmful, for_attack = (
            take_batch(batches, name, "tar") for name in ("alignment", "harmful", "adversary"))
        attack_key, tamper_key, retain_key = split_key(key, 3)
        attacked, losses = attack(adapter, frozen, for_attack, attack_key)
        tamper_loss, tamper_grads = after(
            losses[-1], lambda: loss_gradient(tamper_loss_fn, attacked, frozen, harmful, key=tamper_key))

        def retain(adapter):
            loss, distance = retain_fn(adapter, frozen, retained, state.start, key=retain_key)
            return loss + distance, {"loss": loss, "hidden_distance": distance}

        retain_grads, metrics = after(tamper_loss, lambda: jax.grad(retain, has_aux=True)(adapter))
        grads = jax.tree.map(lambda t, r: tamper_weight * t + retain_weight * r, tamper_grads, retain_grads)
        return grads, state, metrics | {
            "tamper_loss": tamper_loss, "adversary_loss": losses[0], "attacked_adversary_loss": losses[-1]}

    return Defense(TarState, gradient)
