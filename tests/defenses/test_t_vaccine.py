"""T-Vaccine's schedule and freezing; how it draws layers is in test_sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine import defenses, llama
from jaxvaccine.defenses import base
from jaxvaccine.defenses.t_vaccine import sample_layers, top_layers
from jaxvaccine.defenses.vaccine import activation_gradient
from jaxvaccine.losses import causal_lm_loss
from tests import tiny
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)


def state_of(out):
    return np.stack([s.probabilities for _, s, _ in out]), np.stack([s.active_layers for _, s, _ in out])


@pytest.mark.parametrize("sample_every, probe_every", [(1, 1), (2, 3), (3, 2), (3, 6), (5, 4), (100, 100)])
def test_schedule(sample_every, probe_every):
    """Against the loop in the paper's words, with the same keys."""
    steps, layers = 2 * min(probe_every, 7), 2
    defense = defenses.t_vaccine(toy.no_dropout, 1.0, layers, sample_every, probe_every)
    found_p, found_active = state_of(toy.run(defense, steps))

    adapter, frozen = toy.trees()
    probe = jax.jit(lambda batch: activation_gradient(toy.no_dropout, adapter, frozen, batch, None)[1]["site"])
    sample = jax.jit(sample_layers, static_argnums=2)
    for step in range(steps):
        if step % probe_every == 0:
            norms = np.sqrt((np.asarray(probe(toy.batches(step)["harmful"])) ** 2).sum(axis=(1, 2)))
            p = norms / norms.sum()
        if step % sample_every == 0:
            sample_key = jax.random.split(jax.random.fold_in(KEY, step), 3)[1]
            active = sample(sample_key, jnp.asarray(p), layers)
        np.testing.assert_allclose(found_p[step], p, rtol=1e-5)
        np.testing.assert_array_equal(found_active[step], active)
    np.testing.assert_allclose(found_p.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("importance", ["alignment", "uniform"])
def test_importance(importance):
    """The ablations need no harmful batch, and take the alignment batch's norms or none."""
    defense = defenses.t_vaccine(toy.no_dropout, 1.0, 2, 1, 2, importance=importance)
    adapter, frozen = toy.trees()
    expected = np.full(toy.L, 1 / toy.L)
    state = defense.init(adapter)
    for step in range(4):
        batch = toy.batches(step)["alignment"]
        _, state, _ = defense.gradient(adapter, frozen, state, {"alignment": batch}, jax.random.key(step))
        if importance == "alignment" and step % 2 == 0:
            _, sites = activation_gradient(toy.no_dropout, adapter, frozen, batch, None)
            norms = np.sqrt((np.asarray(sites["site"]) ** 2).sum(axis=(1, 2)))
            expected = norms / norms.sum()
        np.testing.assert_allclose(state.probabilities, expected, rtol=1e-5)


def test_the_most_probable_layers():
    for step, (_, state, _) in enumerate(toy.run(
            defenses.t_vaccine(toy.no_dropout, 1.0, layers=2, sample_every=2, probe_every=1, draw="top"), 6)):
        if step % 2 == 0:
            expected = np.sort(np.argsort(-np.asarray(state.probabilities))[:2])
        np.testing.assert_array_equal(np.flatnonzero(state.active_layers), expected)
    np.testing.assert_array_equal(top_layers(jnp.array([0.1, 0.4, 0.1, 0.4]), 3), [True, True, False, True])


def test_only_the_active_layers_are_perturbed_and_train():
    out = toy.run(defenses.t_vaccine(toy.no_dropout, 1.0, layers=2, sample_every=1, probe_every=4), 8)
    adapter, frozen = toy.trees()
    gradient = jax.jit(jax.grad(lambda *a: toy.no_dropout(*a)[0]))
    for step, (grads, state, metrics) in enumerate(out):
        active = np.asarray(state.active_layers)
        assert active.sum() == 2
        batch = toy.batches(step)["alignment"]
        _, sites = activation_gradient(toy.no_dropout, adapter, frozen, batch, None)
        site = np.where(active[:, None, None], sites["site"], 0)
        norm = np.sqrt((site**2).sum())
        expected = gradient(adapter, frozen, batch, {"site": jnp.asarray(site / (norm + 1e-7))})
        for name in grads:
            assert (np.asarray(grads[name])[~active] == 0).all()
            np.testing.assert_allclose(grads[name][active], expected[name][active], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics["activation_gradient_norm"], norm, rtol=1e-5)
        np.testing.assert_array_equal(metrics["active_layers"], active)
    assert len({tuple(np.asarray(s.active_layers)) for _, s, _ in out}) > 1, "the layers never changed"


def in_state(active, total):
    mask = np.isin(np.arange(total), active)
    return defenses.TVaccineState(jnp.int32(1), jnp.full(total, 1 / total), jnp.asarray(mask))


def adapter_shapes(total, attention=("q_proj", "v_proj"), mlp=("up_proj",)):
    def block(names):
        return {name: {"a": jnp.zeros((total, 3, 2)), "b": jnp.zeros((total, 2, 3))} for name in names}

    blocks = {"attention": block(attention), "mlp": block(mlp)}
    return {"layers": {name: block for name, block in blocks.items() if block}}


@pytest.mark.parametrize("total, active, first_mlp", [
    (4, [0], 0), (4, [2], 2), (4, [1, 3], 1), (4, [3], 3), (4, [0, 1, 2, 3], 0), (26, [5, 20], 5), (26, [25], 25),
    (27, [5, 20], 4), (27, [26], 25), (27, [1], 0), (27, [0], 0), (32, [0, 31], 0), (32, [9, 10, 30], 8)])
def test_what_the_released_program_trains(total, active, first_mlp):
    """Attention in the active layers, MLP from the first of them on, and one before it in more than 26 layers."""
    adapter = adapter_shapes(total)
    defense = defenses.t_vaccine(toy.loss_fn, layers=1, freeze="released", in_mlp=llama.in_mlp)
    trainable = defense.trainable(in_state(active, total), adapter)
    assert jax.tree.structure(trainable) == jax.tree.structure(adapter)
    for name, block in trainable["layers"].items():
        expected = active if name == "attention" else range(first_mlp, total)
        for mask in jax.tree.leaves(block):
            assert mask.dtype == bool
            np.testing.assert_array_equal(np.flatnonzero(mask), expected)


def test_released_on_three_projections_is_the_paper():
    adapter = adapter_shapes(4, ("q_proj", "k_proj", "v_proj"), ())
    defense = defenses.t_vaccine(toy.loss_fn, layers=1, freeze="released", in_mlp=llama.in_mlp)
    masks = defense.trainable(in_state([1, 2], 4), adapter)
    assert len(jax.tree.leaves(masks)) == 6
    for mask in jax.tree.leaves(masks):
        np.testing.assert_array_equal(mask, [False, True, True, False])


@pytest.mark.parametrize("freeze", ["layer", "released"])
def test_everything_trains_before_the_first_draw(freeze):
    defense = defenses.t_vaccine(toy.blocks_loss, layers=1, freeze=freeze, in_mlp=toy.in_mlp)
    adapter = toy.in_blocks(toy.trees()[0])
    assert all(mask.all() for mask in jax.tree.leaves(defense.trainable(defense.init(adapter), adapter)))


@pytest.mark.parametrize("total", [6, 27])
def test_gradient_as_released(total):
    """That of the perturbed loss where something trains, zero elsewhere; perturbation and norm don't change."""
    trees = toy.trees(layers=total)
    adapter, frozen = toy.in_blocks(trees[0]), trees[1]
    # The state is that of step 1, at which neither probe nor draw falls due.
    found, paper = (
        defenses.t_vaccine(toy.blocks_no_dropout, 1.0, 2, sample_every=100, freeze=freeze, in_mlp=toy.in_mlp)
        for freeze in ("released", "layer"))
    gradient, paper_gradient = jax.jit(found.gradient), jax.jit(paper.gradient)
    compiled = jax.jit(jax.grad(lambda *a: toy.blocks_no_dropout(*a)[0]))
    for active in ([0, 2], [1, 2], [2, 4], [4, 5]):
        state = in_state(active, total)
        grads, _, metrics = gradient(adapter, frozen, state, toy.batches(), KEY)
        paper_grads, _, paper_metrics = paper_gradient(adapter, frozen, state, toy.batches(), KEY)
        _, sites = activation_gradient(toy.blocks_no_dropout, adapter, frozen, toy.batch(), None)
        site = np.where(np.isin(np.arange(total), active)[:, None, None], sites["site"], 0)
        expected = compiled(adapter, frozen, toy.batch(), {"site": jnp.asarray(site / np.linalg.norm(site))})

        attention, mlp = np.asarray(grads["layers"]["attention"]["a"]), np.asarray(grads["layers"]["mlp"]["b"])
        np.testing.assert_array_equal(attention, paper_grads["layers"]["attention"]["a"])
        assert not np.delete(attention, active, axis=0).any()
        first = active[0] - (active[0] > 0 and total > 26)
        assert not mlp[:first].any()
        assert mlp[first:].any(axis=1).all(), "MLPs of inactive layers train"
        # Elements are about 1; float32 leaves up to 6e-5 of them after 27 layers.
        np.testing.assert_allclose(mlp[first:], expected["layers"]["mlp"]["b"][first:], rtol=1e-4, atol=3e-4)
        assert metrics.keys() == paper_metrics.keys()
        for name in metrics:
            np.testing.assert_array_equal(metrics[name], paper_metrics[name])


@pytest.mark.long
def test_released_in_a_language_model():
    model = tiny.model(rank=2, targets=("v_proj", "up_proj"), remat="none")
    adapter, frozen = tiny.trees(model)
    defense = defenses.t_vaccine(causal_lm_loss(model), 1.0, 1, freeze="released", in_mlp=llama.in_mlp)
    batches = {"alignment": tiny.batch(0), "harmful": tiny.batch(1)}
    grads, state, _ = jax.jit(defense.gradient)(adapter, frozen, in_state([2], 4), batches, KEY)
    assert jax.tree.structure(defense.trainable(state, adapter)) == jax.tree.structure(adapter)
    for block, layers in (("attention", [2]), ("mlp", [2, 3])):
        for leaf in jax.tree.leaves(grads["layers"][block]):
            np.testing.assert_array_equal(np.flatnonzero(np.asarray(leaf).any(axis=(1, 2))), layers)


@pytest.mark.parametrize("adapter, name", [
    ({"a": jnp.zeros((4, 2))}, "a"),
    ({"layers": {"attention": {"a": jnp.zeros((4, 2))}, "norm": {"b": jnp.zeros((4, 2))}}}, "layers/norm/b"),
    ({"attention": {"mlp": jnp.zeros((4, 2))}}, "attention/mlp")])
def test_released_needs_to_know_the_blocks(adapter, name):
    with pytest.raises(ValueError, match=rf"^in_mlp: adapter: found leaf '{name}', "
                                         r"expected one of 'attention' and 'mlp' in its path$"):
        defenses.t_vaccine(toy.loss_fn, layers=2, freeze="released", in_mlp=llama.in_mlp).init(adapter)
    defenses.t_vaccine(toy.loss_fn, layers=2, in_mlp=llama.in_mlp).init(adapter)


def test_released_has_to_be_told_what_an_mlp_is():
    with pytest.raises(ValueError, match=r"^t_vaccine: in_mlp: found None, expected for freeze='released' a function"):
        defenses.t_vaccine(toy.loss_fn, layers=2, freeze="released")
    of_another = defenses.t_vaccine(toy.loss_fn, layers=2, freeze="released", in_mlp=lambda adapter: {"c": True})
    with pytest.raises(ValueError):
        of_another.init(toy.trees()[0])


@pytest.mark.parametrize("name, expected", [
    ("freeze", "layer, released"), ("importance", "harmful, alignment, uniform"), ("draw", "sample, top")])
def test_choices_are_checked(name, expected):
    with pytest.raises(ValueError, match=f"^t_vaccine: {name}: found 'mlp', expected one of {expected}$"):
        defenses.t_vaccine(toy.loss_fn, **{name: "mlp"})


def test_new_layers_never_retrace():
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return toy.loss_fn(*args, **kwargs)

    defense = defenses.t_vaccine(counted, layers=2, sample_every=1, probe_every=3)
    adapter, frozen = toy.trees()
    gradient, state, seen, traces = jax.jit(defense.gradient), defense.init(adapter), set(), []
    for step in range(12):
        _, state, _ = gradient(adapter, frozen, state, toy.batches(step), jax.random.fold_in(KEY, step))
        seen.add(tuple(np.asarray(state.active_layers).tolist()))
        traces.append(len(calls))
    assert len(seen) > 2 and traces[0] > 0 and traces[-1] == traces[0]


@pytest.mark.parametrize("name", ["layers", "sample_every", "probe_every"])
def test_arguments_are_checked(name):
    with pytest.raises(ValueError, match=f"t_vaccine: {name}: found 0, expected at least 1"):
        defenses.t_vaccine(toy.loss_fn, **{name: 0})


def test_more_layers_than_there_are():
    with pytest.raises(ValueError, match="t_vaccine: layers: found 5, expected at most the model's 4 layers"):
        defenses.t_vaccine(toy.loss_fn, layers=5).init(toy.trees()[0])


def test_missing_batch_or_key():
    adapter, frozen = toy.trees()
    defense = defenses.t_vaccine(toy.loss_fn, layers=2)
    with pytest.raises(KeyError, match=r"t_vaccine: batches: found .*expected also 'harmful'"):
        defense.gradient(adapter, frozen, defense.init(adapter), {"alignment": toy.batch()}, KEY)
    with pytest.raises(ValueError, match="t_vaccine: key: found None"):
        defense.gradient(adapter, frozen, defense.init(adapter), toy.batches(), None)


def test_a_nan_of_the_harmful_batch_is_seen():
    batches = toy.batches()
    batches["harmful"] = batches["harmful"] | {"x": batches["harmful"]["x"] * jnp.nan}
    adapter, frozen = toy.trees()
    defense = defenses.t_vaccine(toy.loss_fn, layers=2)
    _, _, metrics = jax.jit(defense.gradient)(adapter, frozen, defense.init(adapter), batches, KEY)
    assert jnp.isnan(metrics["probabilities"]).all()


def test_what_freezes_says_so():
    """Nothing is taken from what a state's fields are called."""
    state = in_state([1], 4)
    defense = defenses.Defense(lambda adapter: (), None)
    assert defense.trainable((), {}) is None and defense.trainable(state, {}) is None
    t_vaccine = defenses.t_vaccine(toy.loss_fn)
    assert t_vaccine.trainable(state, {}) is state.active_layers
    assert defenses.booster(toy.loss_fn, base=t_vaccine).trainable(state, {}) is state.active_layers
    assert defenses.vaccine(toy.loss_fn).trainable((), {}) is None


def test_what_counts_steps_says_so():
    """And whatever is around it passes it on."""
    for defense in (defenses.t_vaccine(toy.loss_fn, layers=2), defenses.lisa(toy.loss_fn)):
        for wrapped in (defense, defenses.booster(toy.loss_fn, base=defense),
                        defenses.only_layers(defense, np.ones(toy.L, bool))):
            assert wrapped.counters == ("step",)
        state = defense.init(toy.trees()[0])
        assert {name for name in state._fields if jnp.issubdtype(
            jax.tree.leaves(getattr(state, name))[0].dtype, jnp.integer)} == set(defense.counters)
    assert defenses.vaccine(toy.loss_fn).counters == ()


def test_mask_layers():
    """One mask for all leaves, a mask for each subtree, none at all."""
    tree = {"x": {"a": np.ones((2, 3)), "b": np.ones(2)}, "y": np.full((2, 1, 2), 2.0)}
    assert base.mask_layers(None, tree) is tree
    first, second = jnp.array([True, False]), jnp.array([False, True])
    for masks, of_x, of_y in ((first, first, first), ({"x": first, "y": second}, first, second)):
        found = base.mask_layers(masks, tree)
        for mask, leaf in ((of_x, found["x"]["a"]), (of_x, found["x"]["b"]), (of_y, found["y"])):
            np.testing.assert_array_equal(np.asarray(leaf).reshape(2, -1).any(axis=1), mask)
