"""Rounds of clients: against plain training where that is the same, and rules against NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from jaxvaccine import defenses, federated, optim, training
from jaxvaccine.experiment.lanes import over_lanes
from jaxvaccine.losses import causal_lm_loss
from tests import tiny
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("float64", "quick_compile")

KEY = jax.random.key(0)
CLIENTS, STEPS = 3, 2
SFT = defenses.sft(toy.no_dropout, batch="user")


def optimizer(kind="sgd", clip=None, decay=None):
    return lambda rate: optim.layer_masked_step(kind, optim.Scalars(rate, decay, clip))


def close(found, expected, tolerance=1e-12):
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=tolerance, atol=tolerance), found, expected)


def stacked(seeds):
    """{"user": batches [C, K, ...]} of seeds [C, K]."""
    batches = [[toy.batch(seed) for seed in of] for of in seeds]
    return {"user": jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(*np.shape(seeds), *leaves[0].shape),
                                 *[batch for of in batches for batch in of])}


def rounds(round_fn, adapter, frozen, of_rounds, rates, weights=None):
    """The server after rounds whose clients' batches have these seeds, [R, C, K]."""
    server, seen = federated.start(adapter), []
    for seeds in of_rounds:
        count = len(seeds)
        clients = federated.Clients(np.arange(count), np.ones(count) if weights is None else weights, stacked(seeds))
        server, metrics = round_fn(server, frozen, clients, rates, KEY)
        seen.append(metrics)
    return server, seen


def plain(defense, adapter, frozen, seeds, kind="sgd", rate=0.1, clip=None, decay=None, batches=None):
    """The adapter after plain training on batches of these seeds, by the training step of everybody."""
    by = optim.layer_masked_step(kind, optim.Scalars(rate, decay, clip))
    state = training.init_train_state(adapter, defense, by)
    step = training.make_train_step(defense, by)
    for batch in batches or [{"user": toy.batch(seed)} for seed in seeds]:
        state, _ = step(state, frozen, batch, KEY)
    return state.adapter


# A round against plain training


@pytest.mark.parametrize("kind, clip, decay", [("sgd", None, None), ("sgd", 0.3, 0.1), ("normalised_sgd", None, None)])
@pytest.mark.parametrize("rule", ["fedavg", "median"])
def test_clients_alike_are_central_training(rule, kind, clip, decay):
    """Same rows in the same order, a step a round: of optimizers without moments over any number of rounds."""
    adapter, frozen = toy.trees()
    round_fn = federated.make_round(SFT, optimizer(kind, clip, decay), federated.AGGREGATIONS[rule]())
    found, _ = rounds(round_fn, adapter, frozen, [[[seed]] * CLIENTS for seed in range(5)], np.array([0.1]))
    close(found.adapter, plain(SFT, adapter, frozen, range(5), kind, clip=clip, decay=decay))
    assert int(found.round) == 5


def test_clients_alike_with_adam_are_central_training_of_one_round():
    """And of no more: in the next one its moments are new."""
    adapter, frozen = toy.trees()
    round_fn = federated.make_round(SFT, optimizer("adamw", 1.0, 0.1), federated.fedavg())
    one, _ = rounds(round_fn, adapter, frozen, [[[0, 1, 2]] * CLIENTS], np.full(3, 0.1))
    close(one.adapter, plain(SFT, adapter, frozen, range(3), "adamw", clip=1.0, decay=0.1))
    three, _ = rounds(round_fn, adapter, frozen, [[[seed]] * CLIENTS for seed in range(3)], np.full(1, 0.1))
    central = plain(SFT, adapter, frozen, range(3), "adamw", clip=1.0, decay=0.1)
    assert max(np.abs(f - e).max() for f, e in zip(*map(jax.tree.leaves, (three.adapter, central)), strict=True)) > 1e-3
    anew = adapter
    for seed in range(3):
        anew = plain(SFT, anew, frozen, [seed], "adamw", clip=1.0, decay=0.1)
    close(three.adapter, anew)


def test_one_client_is_plain_fine_tuning():
    """One of one, all steps in a round; with SGD in as many rounds as one likes."""
    adapter, frozen = toy.trees()
    seeds = np.arange(6)
    for kind, split in (("adamw", (1, 6)), ("sgd", (3, 2)), ("sgd", (6, 1))):
        round_fn = federated.make_round(SFT, optimizer(kind), federated.fedavg())
        found, seen = rounds(round_fn, adapter, frozen, seeds.reshape(split[0], 1, split[1]), np.full(split[1], 0.1))
        close(found.adapter, plain(SFT, adapter, frozen, seeds, kind))
        assert seen[0]["loss"].shape == (1, split[1]) and seen[0]["update_norm"].shape == (1,)


def test_a_step_a_round_is_a_step_on_all_rows():
    """FedSGD: the mean of clients' gradients on different rows is the gradient on all of them."""
    adapter, frozen = toy.trees()
    round_fn = federated.make_round(SFT, optimizer(), federated.fedavg())
    found, _ = rounds(round_fn, adapter, frozen, [[[0], [1], [2]]], np.array([0.5]))
    joined = jax.tree.map(lambda *rows: jnp.concatenate(rows), *map(toy.batch, range(3)))
    close(found.adapter, plain(SFT, adapter, frozen, (), rate=0.5, batches=[{"user": joined}]))


@pytest.mark.long
def test_a_step_a_round_is_a_step_on_all_tokens():
    """FedSGD, of a language model: weights by supervised tokens give the gradient of the joined batch's mean."""
    model = tiny.model(targets=("q_proj", "down_proj"), dtype=jnp.float64, remat="none")
    adapter, frozen = jax.tree.map(lambda x: x.astype(jnp.float64), tiny.trees(model))
    defense = defenses.sft(causal_lm_loss(model), batch="user")
    batches = [tiny.batch(seed) for seed in range(CLIENTS)]
    tokens = [(batch["labels"][:, 1:] >= 0).sum() for batch in batches]
    assert len(set(map(int, tokens))) > 1
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    clients = federated.Clients(np.arange(CLIENTS), np.array(tokens, float), {"user": {
        name: np.stack([batch[name][None] for batch in batches]) for name in joined}})
    round_fn = federated.make_round(defense, optimizer(), federated.fedavg())
    found, _ = round_fn(federated.start(adapter), frozen, clients, np.array([0.5]), KEY)
    close(found.adapter, plain(defense, adapter, frozen, (), rate=0.5, batches=[{"user": joined}]))


def test_the_mean_is_of_the_factors():
    """What FedIT averages: (mean A)(mean B), which is not mean(A B)."""
    a, b = (np.random.default_rng(i).normal(size=(CLIENTS, *shape)) for i, shape in enumerate(((1, 4, 2), (1, 2, 4))))
    found = federated.fedavg()({"a": a, "b": b}, jnp.ones(CLIENTS))
    product = found["a"] @ found["b"]
    close(product, a.mean(0) @ b.mean(0))
    assert np.abs(product - (a @ b).mean(0)).max() > 0.1


def test_clients_lanes_in_turns_are_the_same():
    adapter, frozen = toy.trees()
    seeds = [[[0, 1], [2, 3], [4, 5]]] * 2
    found = []
    for over in (jax.vmap, lambda function, axes: over_lanes(function, axes, turns=True)):
        round_fn = federated.make_round(federated.proximal(SFT, 0.2), optimizer("adamw"), federated.trimmed_mean(0.4),
                                        server_learning_rate=0.5, over=over)
        found.append(rounds(round_fn, adapter, frozen, seeds, np.array([0.1, 0.05]), np.array([1.0, 2.0, 3.0])))
    close(*found)


def test_rates_weights_and_the_servers_rate():
    """Against a round by hand: every client's own training, and their mean."""
    adapter, frozen = toy.trees()
    seeds, rates, weights = [[0, 1], [2, 3]], np.array([0.1, 0.02]), np.array([1.0, 3.0])
    round_fn = federated.make_round(SFT, optimizer(), federated.fedavg(), server_learning_rate=0.7)
    found, seen = rounds(round_fn, adapter, frozen, [seeds], rates, weights)
    updates = []
    for of in seeds:
        trained = adapter
        for seed, rate in zip(of, rates, strict=True):
            trained = plain(SFT, trained, frozen, [seed], rate=rate)
        updates.append(jax.tree.map(jnp.subtract, trained, adapter))
    close(found.adapter, jax.tree.map(lambda w, u, v: w + 0.7 * (u / 4 + 3 * v / 4), adapter, *updates))
    close(seen[0]["update_norm"], [float(defenses.base.global_norm(u)) for u in updates])


def test_what_a_step_draws_is_of_client_and_step():
    """With dropout, equal clients differ, and so do equal rounds; the same again is the same."""
    adapter, frozen = toy.trees()
    round_fn = federated.make_round(defenses.sft(toy.loss_fn, batch="user"), optimizer(), federated.fedavg())
    _, seen = rounds(round_fn, adapter, frozen, [[[0], [0]]], np.array([0.0]))
    _, twice = rounds(round_fn, adapter, frozen, [[[0], [0]]] * 2, np.array([0.0]))
    losses = np.ravel([m["loss"] for m in twice])
    assert len(set(losses)) == 4
    np.testing.assert_array_equal(seen[0]["loss"], twice[0]["loss"])


def test_what_a_defense_freezes_stays():
    """Also below a proximal term, which would pull on it."""
    adapter, frozen = toy.trees()
    layers = np.array([True, False, True, False])
    defense = federated.proximal(defenses.only_layers(SFT, layers), 0.5)
    round_fn = federated.make_round(defense, optimizer("adamw", decay=0.1), federated.fedavg())
    found, _ = rounds(round_fn, adapter, frozen, [[[0, 1], [2, 3]]], np.full(2, 0.1))
    for after, before in zip(*map(jax.tree.leaves, (found.adapter, adapter)), strict=True):
        np.testing.assert_array_equal(np.abs(after - before).reshape(len(layers), -1).max(1) > 0, layers)


# FedProx


def test_the_proximal_gradient():
    """By finite differences of f(w) + mu/2 ‖w − start‖², away from the start."""
    start, frozen = toy.trees()
    adapter, batch, mu = jax.tree.map(lambda x: x + 0.3, start), toy.batch(), 0.7
    defense = federated.proximal(SFT, mu)

    def objective(w):
        apart = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), w, start)
        return toy.no_dropout(w, frozen, batch)[0] + mu / 2 * sum(jax.tree.leaves(apart))

    grads, _, metrics = defense.gradient(adapter, frozen, defense.init(start), {"user": batch}, None)
    for seed in range(3):
        along = tiny.direction(adapter, seed)
        slope = tiny.slope(objective, (adapter,), (along,), 1e-3)
        assert slope == pytest.approx(float(tiny.dot(grads, along)), rel=1e-8)
    assert float(metrics["proximal_distance"]) == pytest.approx(
        0.3 * np.sqrt(sum(leaf.size for leaf in jax.tree.leaves(start))))


def test_a_proximal_term_holds_clients_and_0_does_nothing():
    adapter, frozen = toy.trees()
    seeds, rates = [[[0] * 8, [1] * 8]], np.full(8, 0.1)

    def norms(defense):
        round_fn = federated.make_round(defense, optimizer(), federated.fedavg())
        server, seen = rounds(round_fn, adapter, frozen, seeds, rates)
        return server.adapter, np.asarray(seen[0]["update_norm"])

    (alone, free), (zero, _), (_, held) = (norms(defense) for defense in (
        SFT, federated.proximal(SFT, 0.0), federated.proximal(SFT, 5.0)))
    close(alone, zero)
    assert (held < 0.8 * free).all()


# Rules


def updates_of():
    """Two leaves and weights; few shapes, since each compiles."""
    finite = st.floats(-1e3, 1e3, width=32)
    return st.sampled_from((1, 4, 7)).flatmap(lambda count: st.tuples(
        *(arrays.arrays(np.float64, (count, *shape), elements=finite) for shape in ((2, 3), (4,))),
        arrays.arrays(np.float64, count, elements=st.floats(0.5, 100))))


@settings(max_examples=20)
@given(updates_of())
def test_fedavg_is_numpys_average(of):
    a, b, weights = of
    found = federated.fedavg()({"a": a, "b": b}, jnp.asarray(weights))
    close(found, {"a": np.average(a, axis=0, weights=weights), "b": np.average(b, axis=0, weights=weights)}, 1e-10)


@settings(max_examples=20)
@given(updates_of(), st.sampled_from((1, 2, 3)))
def test_median_and_trimmed_mean_are_numpys_and_scipys(of, cut):
    a, b, weights = of
    found = federated.median()({"a": a, "b": b}, jnp.asarray(weights))
    close(found, {"a": np.median(a, axis=0), "b": np.median(b, axis=0)}, 1e-10)
    if 2 * cut < len(a):
        share = cut / len(a) + 1e-9  # SciPy rounds down what is a whole number but for its last digit
        found = federated.trimmed_mean(share)({"a": a, "b": b}, jnp.asarray(weights))
        close(found, {"a": stats.trim_mean(a, share, axis=0), "b": stats.trim_mean(b, share, axis=0)}, 1e-10)


@settings(max_examples=20)
@given(updates_of(), st.floats(1e-3, 1e3))
def test_clipping_bounds_a_client(of, norm):
    """Long updates become `norm` long and keep their direction, short ones are as they were."""
    a, b, weights = of
    rule = federated.clipped_mean(norm)
    for i in range(2 if len(a) > 1 else 1):
        one = rule({"a": a[i:i + 1], "b": b[i:i + 1]}, jnp.ones(1))
        whole = np.concatenate([a[i].ravel(), b[i].ravel()])
        length = np.linalg.norm(whole)
        found = np.concatenate([np.ravel(one["a"]), np.ravel(one["b"])])
        assert np.linalg.norm(found) <= norm * (1 + 1e-12)
        close(found, whole if length <= norm else whole * norm / length, 1e-9)
    lengths = np.sqrt((a**2).sum(axis=(1, 2)) + (b**2).sum(axis=1))
    scale = np.minimum(1, norm / np.maximum(lengths, 1e-300))
    found = rule({"a": a, "b": b}, jnp.asarray(weights))
    close(found["b"], np.average(b * scale[:, None], axis=0, weights=weights), 1e-9)


def test_one_client_moves_a_mean_as_far_as_it_likes_and_no_robust_rule():
    honest = np.linspace(-1, 1, 9)[:, None]
    moved = {}
    for name, settings_of in (("fedavg", {}), ("median", {}), ("trimmed_mean", {"share": 0.1}),
                              ("clipped_mean", {"norm": 1.0})):
        rule = federated.AGGREGATIONS[name](**settings_of)
        moved[name] = abs(float(rule({"w": np.vstack([honest, [[1e6]]])}, jnp.ones(10))["w"][0]))
    assert moved["fedavg"] > 1e4 and max(moved[name] for name in moved if name != "fedavg") <= 0.5


@pytest.mark.parametrize("share, count, expected", [
    (0.3, 10, 3), (0.1, 30, 3), (0.29, 100, 29), (0.2, 9, 1), (0.4, 3, 1)])
def test_how_many_are_cut(share, count, expected):
    assert federated.trimmed_count(share, count) == expected


# Who takes part


def test_clients_are_drawn_evenly_and_never_twice():
    drawn = np.array([federated.sample_clients(KEY, i, 5, 3) for i in range(300)])
    assert all(len(set(row)) == 3 and list(row) == sorted(row) for row in drawn.tolist())
    counts = np.bincount(drawn.ravel(), minlength=5)
    # 180 of each, with a standard deviation of √(300 · 0.6 · 0.4) = 8.5.
    assert np.abs(counts - 180).max() < 5 * 8.5
    np.testing.assert_array_equal(federated.sample_clients(KEY, 7, 5, 3), drawn[7])
    np.testing.assert_array_equal(federated.sample_clients(KEY, 7, 4, 4), range(4))


def test_weights():
    np.testing.assert_array_equal(federated.client_weights([3, 5]), [3.0, 5.0])
    np.testing.assert_array_equal(federated.client_weights([3, 5], "equal"), [1.0, 1.0])


@pytest.mark.parametrize("call, expected", [
    (lambda: federated.trimmed_mean(0.5), "trimmed_mean: share: found 0.5"),
    (lambda: federated.trimmed_mean(0.2)({"w": np.ones((4, 2))}, np.ones(4)), "found 0.2 of 4 clients.* at least 0.25"),
    (lambda: federated.clipped_mean(0.0), "clipped_mean: norm: found 0.0"),
    (lambda: federated.proximal(SFT, -1.0), "proximal: mu: found -1.0"),
    (lambda: federated.make_round(SFT, optimizer(), federated.fedavg(), server_learning_rate=float("nan")),
     "server_learning_rate: found nan"),
    (lambda: federated.sample_clients(KEY, 0, 3, 4), "count: found 4, expected 1 to 3"),
    (lambda: federated.client_weights([3, 0]), "rows: found 0 of client 1"),
    (lambda: federated.client_weights([3], "tokens"), "kind: found 'tokens'")])
def test_errors(call, expected):
    with pytest.raises(ValueError, match=expected):
        call()


def test_a_share_that_leaves_no_client():
    """0.5 is none, but what is rounded to it would be."""
    assert federated.trimmed_count(0.4, 5) == 2
    with pytest.raises(ValueError, match=r"share: found 0.49999999999 of 4 clients a round, which cuts all"):
        federated.trimmed_count(0.49999999999, 4)
