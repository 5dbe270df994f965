"""Refusal ablation by its definition: nothing is left along the direction, and nothing else is lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine import llama
from jaxvaccine.attacks import refusal_ablation as of
from jaxvaccine.llama_config import FAMILIES
from jaxvaccine.merging import merge_adapter
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compile", "float64")
CONFIGS = {"llama": tiny.CONFIG, "llama_tied": dataclasses.replace(tiny.CONFIG, tie_word_embeddings=True),
           **{name: config for name, config in tiny.FAMILIES.items() if name != "gemma2"}}


def random_model(config, dtype=jnp.float64):
    """With norms that are not neutral and biases that are not zero."""
    model, rng = llama.Llama(config, dtype=dtype), np.random.default_rng(0)
    return model, jax.tree.map(lambda x: jnp.asarray(
        (x.ndim == 1) + rng.normal(size=x.shape) * (0.16 if x.ndim == 3 else 0.1), x.dtype),
        llama.tree_shapes(model)["params"])


def prompts(seed, count=7):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, tiny.CONFIG.vocab_size, rng.integers(3, 12)).astype(np.int32) for _ in range(count)]


def unit():
    r = np.random.default_rng(7).normal(size=tiny.CONFIG.hidden_size)
    return jnp.asarray(r / np.linalg.norm(r))


def stream(model, frozen, batch):
    """What every layer reads of the residual stream, [L, B, T, D], and the final states, normed."""
    found = jax.jit(lambda frozen: llama.layer_activations(
        model, None, frozen, batch["input_ids"], batch["attention_mask"]))(frozen)
    return np.asarray(found.inputs, np.float64), np.asarray(found.final, np.float64)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in ("mistral", "qwen2_window")))
                                  for name in CONFIGS])
def test_nothing_is_left_along_the_direction(name):
    """At any layer, of any token, nor after the last; and the weights are those of the definition."""
    model, frozen = random_model(CONFIGS[name])
    r, batch = unit(), tiny.batch()
    found, new = of.ablate(model, frozen, r), of.untied(model)
    (before, _), (after, final) = stream(model, frozen, batch), stream(new, found, batch)
    assert np.abs(before @ r).max() > 0.1
    assert (np.abs(after @ r) <= 1e-13 * np.linalg.norm(after, axis=-1)).all()
    # What the last norm reads: its scale undone.
    assert np.abs((final / found["norm"]["scale"]) @ r).max() <= 1e-12
    project = np.eye(len(r)) - np.outer(r, r)
    by_hand = jax.tree.map(np.asarray, frozen)
    by_hand["embed_tokens"] = by_hand["embed_tokens"] @ project
    for block, site in (("attention", "o_proj"), ("mlp", "down_proj")):
        by_hand["layers"][block][site]["kernel"] = np.stack([
            layer @ project for layer in by_hand["layers"][block][site]["kernel"]])
    if model.config.tie_word_embeddings:
        by_hand["lm_head"] = np.asarray(frozen["embed_tokens"]).T  # as it was
    assert jax.tree.structure(found) == jax.tree.structure(by_hand)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-14), found, by_hand)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(lambda x: x.shape, llama.tree_shapes(new)["params"])


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_twice_is_once(name):
    model, frozen = random_model(CONFIGS[name])
    once = of.ablate(model, frozen, unit())
    twice = of.ablate(of.untied(model), once, unit())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-15), once, twice)
    assert tiny.relative_difference(once["layers"], frozen["layers"]) > 0.01


def test_in_bfloat16_what_is_left_is_rounding():
    model, frozen = random_model(tiny.CONFIG, jnp.bfloat16)
    (after, _), (before, _) = (stream(model, of_model, tiny.batch()) for of_model in (
        of.ablate(model, frozen, unit().astype(jnp.float32)), frozen))
    left, was = (np.sqrt(np.mean((x @ unit()) ** 2)) for x in (after, before))
    assert 0 < left < 0.02 * was


def test_families_with_a_norm_before_the_stream():
    assert of.lacks(tiny.FAMILIES["gemma2"]) and not of.lacks(tiny.CONFIG)
    model, frozen = random_model(tiny.FAMILIES["gemma2"])
    with pytest.raises(ValueError, match=r"^ablate: model: found a norm between o_proj, down_proj .*gemma2"):
        of.ablate(model, frozen, unit())
    assert {config.model_type for config in CONFIGS.values()} == {
        name for name, family in FAMILIES.items() if not family.post_norms}, "every family that is allowed is tested"


def test_the_last_tokens_states_are_transformers(tmp_path):
    """Before every layer, at a prompt's last token, whatever stands beside it in the batch."""
    pytest.importorskip("torch")
    from experiments.parity import pytorch_reference
    from jaxvaccine.checkpoints.hugging_face import save_model

    model, frozen = random_model(tiny.CONFIG)
    save_model(model, frozen, tmp_path / "model")
    base, asked = pytorch_reference.load_base(str(tmp_path / "model"), "float64"), prompts(0)
    found = of.last_states(model, None, frozen, asked, rows=3)
    assert found.shape == (model.config.num_layers, len(asked), model.config.hidden_size)
    for i, ids in enumerate(asked):
        hidden = base.model(pytorch_reference.torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True)
        expected = np.stack([x[0, -1].detach().numpy() for x in hidden.hidden_states[:-1]])
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-9, atol=1e-11)


def test_states_of_an_adapter_are_those_of_merged_weights():
    model = tiny.model(dtype=jnp.float64)
    adapter, frozen = tiny.trees(model)
    merged = merge_adapter(model, adapter, frozen)
    np.testing.assert_allclose(of.last_states(model, adapter, frozen, prompts(1)),
                               of.last_states(model.clone(lora=None), None, merged, prompts(1)), rtol=1e-9)


def states(count, shift, seed, layers=10, size=6):
    """Normal numbers, and along the first axis of layer l ± shift[l] / 2."""
    x = np.random.default_rng(seed).normal(size=(layers, count, size))
    x[:, :, 0] += np.asarray(shift)[:, None] / 2
    return x


def test_the_direction_is_the_normalised_difference_of_means():
    shift = np.arange(10.0)
    harmful, harmless = states(40, shift, 0), states(30, -shift, 1)
    found = of.find_direction(harmful, harmless, 4)
    difference = harmful[4].mean(axis=0) - harmless[4].mean(axis=0)
    np.testing.assert_allclose(found.r, difference / np.linalg.norm(difference), rtol=1e-12)
    assert found.layer == 4 and np.isclose(np.linalg.norm(found.r), 1)


def test_the_layer_is_the_one_that_separates_best_among_the_first():
    shift = [9, 1, 0, 5, 2, 1, 0, 3, 30, 30]  # the first layer and the last 20% are not asked
    harmful, harmless = states(400, shift, 0), states(300, -np.asarray(shift), 1)
    found = of.find_direction(harmful, harmless)
    assert found.layer == 3
    # Unit variance, means 5 apart along an axis that is nearly the direction.
    assert abs(found.separations[3] - 5) < 0.4
    assert abs(found.separations[2]) < 0.4, "no separation where there is none, in six dimensions"
    assert list(of.candidates(10)) == [1, 2, 3, 4, 5, 6, 7] and list(of.candidates(2)) == [1]


def test_separations_by_hand():
    """One dimension: the gap of one half's means over its deviation, with the sign of the other half's gap."""
    harmful, harmless = np.array([3.0, 5.0, 5.0, 9.0]), np.array([0.0, 1.0, 2.0, 1.0])
    found = of.separations(harmful[None, :, None], harmless[None, :, None])
    halves = [(harmful[i::2], harmless[i::2]) for i in (0, 1)]
    expected = np.mean([(a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2) for a, b in halves])
    np.testing.assert_allclose(found, [expected])


def test_no_direction():
    same = np.ones((3, 4, 5))
    with pytest.raises(ValueError, match=r"^find_direction: layer: found 0, where harmful and harmless .* one mean"):
        of.find_direction(same, same, 0)
    with pytest.raises(ValueError, match="found 1 harmful and 4 harmless prompts, expected at least 2"):
        of.find_direction(same[:, :1], same)
