"""Federated fine-tuning: clients train copies of one adapter on data of their own, a server joins what they return.

A round: the server sends its adapter to some clients; each trains it for K steps on its own rows, and returns what that
has changed, its update; the server adds what an aggregation rule makes of the updates. The clients of a round are
lanes of one compiled program over one backbone.

What is averaged are the factors A and B of every adapter, each by itself, as FedIT does (arXiv 2305.05644, algorithm
1). That is not the mean of the clients' updates of the weights: mean(A) mean(B) is not mean(A B), and their difference
grows with what clients disagree in. The mean of the products has a rank of up to clients × rank.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvaccine.defenses.base import Defense, check_not_negative, global_norm, scale_tree
from jaxvaccine.training import init_train_state, make_train_step

Tree = Any
# (updates with leaves [C, ...], weights [C]) -> what the server adds, leaves [...].
Aggregate = Callable[[Tree, jax.Array], Tree]
Weights = Literal["rows", "equal"]


def fedavg() -> Aggregate:
    """Σ weight_i update_i / Σ weight_i (McMahan et al., arXiv 1602.05629, algorithm 1)."""

    def aggregate(updates, weights):
        parts = weights / weights.sum()
        return jax.tree.map(lambda u: jnp.tensordot(parts.astype(u.dtype), u, axes=1), updates)

    return aggregate


def median() -> Aggregate:
    """Each number's median over clients, of an even count the mean of the middle two; weights count for nothing (Yin et
    al., arXiv 1803.01498, definition 1)."""

    def aggregate(updates, weights):
        del weights
        return jax.tree.map(lambda u: jnp.median(u, axis=0), updates)

    return aggregate


def trimmed_mean(share: float = 0.1) -> Aggregate:
    """Each number's mean over clients without the largest and the smallest; weights count for nothing (Yin et al.,
    arXiv 1803.01498, definition 2).

    Args:
      share: of the clients, cut on each side, rounded down to whole ones; 0 < share < 0.5.

    Raises:
      ValueError: share is out of range; by aggregate, if it cuts none of so few clients, or all.
    """
    if not 0 < share < 0.5:
        raise ValueError(f"trimmed_mean: share: found {share}, expected more than 0 and less than 0.5")

    def aggregate(updates, weights):
        del weights
        count = jax.tree.leaves(updates)[0].shape[0]
        cut = trimmed_count(share, count)
        return jax.tree.map(lambda u: jnp.sort(u, axis=0)[cut:count - cut].mean(axis=0), updates)

    return aggregate


def trimmed_count(share: float, count: int) -> int:
    """How many of `count` clients a trimmed mean cuts on each side.

    Raises:
      ValueError: none, or so many that no client is left.
    """
    # 0.3 of 10 are 3 of them, whatever the binary fraction is.
    cut = math.floor(round(share * count, 9))
    if cut < 1:
        raise ValueError(f"trimmed_mean: share: found {share} of {count} clients a round, which cuts none, expected at "
                         f"least {1 / count:.3g}")
    if 2 * cut >= count:
        raise ValueError(f"trimmed_mean: share: found {share} of {count} clients a round, which cuts all, expected "
                         "less")
    return cut


def clipped_mean(norm: float = 1.0) -> Aggregate:
    """`fedavg` of updates that are no longer than `norm`: u · min(1, norm / ‖u‖), one norm over all leaves (Sun et al.,
    arXiv 1911.07963).

    Raises:
      ValueError: norm is not above 0.
    """
    if not 0 < norm < math.inf:
        raise ValueError(f"clipped_mean: norm: found {norm}, expected a finite number above 0")

    def clip(update):
        return scale_tree(norm / jnp.maximum(global_norm(update), norm), update)

    def aggregate(updates, weights):
        return fedavg()(jax.vmap(clip)(updates), weights)

    return aggregate


# A rule of your own is a line here: its keyword arguments are its settings.
AGGREGATIONS: dict[str, Callable[..., Aggregate]] = {
    "fedavg": fedavg, "median": median, "trimmed_mean": trimmed_mean, "clipped_mean": clipped_mean}


class ProximalState(NamedTuple):
    """The adapter that the server sent, and the state of what is held near it."""

    start: Tree
    inner: Any


def proximal(defense: Defense, mu: float) -> Defense:
    """FedProx's client (Li et al., arXiv 1812.06127, equation 2): ∇(f(w) + mu/2 ‖w − w_server‖²).

    Args:
      defense: whose gradient is ∇f(w).
      mu: weight of the proximal term; 0 gives the gradient of f.

    Returns:
      A defense with state `ProximalState`, whose start is the adapter of `init`. Metrics: the inner ones, and
      proximal_distance ‖w − w_server‖.

    Raises:
      ValueError: mu is below 0 or not finite.
    """
    check_not_negative("proximal", mu=mu)

    def gradient(adapter, frozen, state, batches, key):
        grads, inner, metrics = defense.gradient(adapter, frozen, state.inner, batches, key)
        apart = jax.tree.map(jnp.subtract, adapter, state.start)
        grads = jax.tree.map(lambda g, d: g + (mu * d).astype(g.dtype), grads, apart)
        return grads, ProximalState(state.start, inner), {**metrics, "proximal_distance": global_norm(apart)}

    # The inner state's counters are no fields of this one's.
    return defense._replace(init=lambda adapter: ProximalState(adapter, defense.init(adapter)), gradient=gradient,
                            trainable=lambda state, adapter: defense.trainable(state.inner, adapter), counters=())


class Server(NamedTuple):
    """All that lasts from one round to the next: a client keeps nothing."""

    round: jax.Array  # int32, rounds done
    adapter: Tree


class Clients(NamedTuple):
    """The clients of a round.

    Attributes:
      ids: [C] int32, which of all clients these are.
      weights: [C], of the mean.
      batches: {name: batch}, leaves [C, K, B, T]: of every client's K steps.
    """

    ids: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray
    batches: Mapping[str, Any]


def start(adapter: Tree) -> Server:
    """The server before the first round."""
    return Server(jnp.zeros((), jnp.int32), adapter)


def sample_clients(key: jax.Array, round: int | jax.Array, clients: int, count: int) -> jax.Array:
    """Which `count` of so many clients take part in a round: [count] int32, ascending, none twice, all sets alike
    likely; a function of the run's key and the round.

    Raises:
      ValueError: count is below 1 or above clients.
    """
    if not 1 <= count <= clients:
        raise ValueError(f"sample_clients: count: found {count}, expected 1 to {clients}")
    return jnp.sort(jax.random.permutation(jax.random.fold_in(key, round), clients)[:count]).astype(jnp.int32)


def client_weights(rows: Sequence[int] | np.ndarray, kind: Weights = "rows") -> np.ndarray:
    """[N] float: every client's weight in a mean, by its number of rows, or 1 of each.

    Raises:
      ValueError: a client without rows, or another kind.
    """
    rows = np.asarray(rows)
    if kind not in ("rows", "equal"):
        raise ValueError(f"client_weights: kind: found {kind!r}, expected rows or equal")
    if not (rows > 0).all():
        raise ValueError(f"client_weights: rows: found {int(rows.min())} of client {int(rows.argmin())}, expected at "
                         "least 1")
    return rows.astype(float) if kind == "rows" else np.ones(len(rows))


def make_round(defense: Defense, optimizer: Callable[[Any], optax.GradientTransformation], aggregate: Aggregate, *,
               server_learning_rate: float = 1.0, over: Callable[..., Callable] = jax.vmap) -> Callable:
    """`round(server, frozen, clients, rates, key) -> (server, metrics)`, jitted.

    Every client starts from the server's adapter with a new optimizer and a new state of the defense, as FedIT's do:
    moments of an earlier round are of another point, and a client that is asked rarely has old ones. What a step draws
    is of `key`, the client's number and the count of local steps of all rounds.

    Args:
      defense: a client's gradient, of the batches that `Clients` has.
      optimizer: learning rate of a step -> its transformation. Its state may not depend on the rate, which is traced.
      aggregate: what becomes of the updates, as of AGGREGATIONS.
      server_learning_rate: by which that is multiplied before it is added.
      over: `jax.vmap`, or what takes its function and in_axes and computes the same.

    Returns:
      A function of the server, the frozen weights, the round's clients, the learning rates [K] of its steps, the same
      of all clients, and the run's key. Its metrics are those of the training step, [C, K, ...], and update_norm [C],
      ‖update‖ of every client, and server_update_norm, that of what was added. It compiles anew for another number of
      clients or steps and for other shapes of batches.

    Raises:
      ValueError: server_learning_rate is below 0 or not finite.
    """
    check_not_negative("make_round", server_learning_rate=server_learning_rate)

    def client(number, batches, adapter, frozen, rates, key, first):
        state = init_train_state(adapter, defense, optimizer(jnp.zeros_like(rates[0])))._replace(step=first)
        own_key = jax.random.fold_in(key, number)

        def step(state, of):
            batch, rate = of
            return make_train_step(defense, optimizer(rate))(state, frozen, batch, own_key)

        state, metrics = jax.lax.scan(step, state, (batches, rates))
        update = jax.tree.map(jnp.subtract, state.adapter, adapter)
        return update, {**metrics, "update_norm": global_norm(update)}

    @jax.jit
    def round(server: Server, frozen, clients: Clients, rates, key):
        rates = jnp.asarray(rates)
        first = (server.round * rates.shape[0]).astype(jnp.int32)
        updates, metrics = over(client, (0, 0, None, None, None, None, None))(
            jnp.asarray(clients.ids), clients.batches, server.adapter, frozen, rates, key, first)
        change = scale_tree(server_learning_rate, aggregate(updates, jnp.asarray(clients.weights)))
        adapter = jax.tree.map(jnp.add, server.adapter, change)
        return Server(server.round + 1, adapter), {**metrics, "server_update_norm": global_norm(change)}

    return round
