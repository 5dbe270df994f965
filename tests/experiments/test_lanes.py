"""A lane computes what align.py and finetune.py compute for its seed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import align, common, finetune, lanes, presets
from jaxvaccine import data, defenses, llama, save_model
from jaxvaccine.checkpoints import files
from jaxvaccine.checkpoints.peft import load_adapter
from jaxvaccine.data import world
from jaxvaccine.llama_config import TARGETS, LlamaConfig
from tests import jaxprs

pytestmark = pytest.mark.usefixtures("quick_compile")

SEEDS = (3, 1)
ALIGN = {**presets.WORLD_ALIGN, "steps": 6, "batch_size": 4, "harmful_batch_size": 2, "targets": TARGETS, "rank": 2,
         "sample_every": 2, "probe_every": 3, "layers": 2, "alignment_data": "world_refusal@train[0:40]",
         "harmful_data": "world_harmful@harmful[0:12]", "learning_rate": 1e-2}
ATTACK = {**presets.WORLD_ATTACK, "n": 16, "steps": 3, "batch_size": 4, "poison_ratio": 0.25}
METHODS = {
    "sft": {"defense": "sft"},
    "t_vaccine_released": {"defense": "t_vaccine", "freeze": "released"},
    "booster": {"defense": "booster", "base_defense": "t_vaccine"},
}


def world_model(directory, layers=3):
    """A model directory with the world's tokenizer and random weights large enough to matter."""
    source = directory / "source"
    source.mkdir()
    vocab_size = world.write_tokenizer(source)
    files.write_json(source / "config.json", {"eos_token_id": 0})
    model = llama.Llama(LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_layers=layers,
                                    num_heads=4, num_kv_heads=2, head_dim=8, max_position_embeddings=64))
    frozen = jax.tree.map(lambda x: x * 8 if x.ndim == 3 else x, llama.init_frozen(model, jax.random.key(0)))
    return str(save_model(model, frozen, directory / "model", tokenizer_from=source))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return world_model(tmp_path_factory.mktemp("world"))


def aligned_lanes(model_dir, config):
    tokenizer, base = data.load_tokenizer(model_dir), common.load_base(model_dir, "checkpoint")
    named = {"alignment": (config.alignment_data, config.batch_size)}
    if config.needs_harmful():
        named["harmful"] = (config.harmful_data, config.harmful_batch_size)
    sources = {name: (data.tokenize_examples(tokenizer, data.load_examples(source), 16), size)
               for name, (source, size) in named.items()}
    return lanes.train(lanes.fresh(base, config, SEEDS), config, [sources] * len(SEEDS), SEEDS)


def assert_same_adapter(found, run_dir, model, atol=2e-5):
    expected = load_adapter(common.adapter_dir(run_dir), model)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-3), found, expected)


@pytest.mark.parametrize("name", METHODS)
def test_lanes_are_the_runs_of_align(model_dir, tmp_path, name):
    config = align.AlignConfig(**ALIGN, **METHODS[name], model=model_dir, run_dir="-", progress=False)
    found, metrics = aligned_lanes(model_dir, config)
    align.align(dataclasses.replace(config, run_dir=str(tmp_path / "run"), seed=SEEDS[1]))
    assert_same_adapter(lanes.take(found.adapters, 1), tmp_path / "run", found.model)
    assert metrics["loss"].shape == (6, 2)
    assert not np.allclose(metrics["loss"][:, 0], metrics["loss"][:, 1])


@pytest.mark.parametrize("adapter, layers", [("continue", None), ("new", None), ("continue", ("2", "0"))])
def test_lanes_are_the_runs_of_finetune(model_dir, tmp_path, adapter, layers):
    config = align.AlignConfig(**ALIGN, defense="sft", model=model_dir, run_dir="-", progress=False)
    align.align(dataclasses.replace(config, run_dir=str(tmp_path / "aligned"), seed=SEEDS[1]))
    attack = finetune.FinetuneConfig(**{**ATTACK, "adapter": adapter}, layers=layers, aligned=str(tmp_path / "aligned"),
                                     run_dir=str(tmp_path / "attacked"), seed=SEEDS[1], progress=False)
    finetune.finetune(attack)
    # After it: --adapter=new donates the base that it finds loaded.
    start, _ = aligned_lanes(model_dir, config)
    attack = attack.resolve(dataclasses.asdict(config))
    tokenizer = data.load_tokenizer(model_dir)
    sources = [{"user": (data.tokenize_examples(tokenizer, data.poison(
        data.load_examples(attack.user_data), data.load_examples(attack.harmful_data), 16, 0.25, seed), 16), 4)}
        for seed in SEEDS]
    seen = []
    found, _ = lanes.train(lanes.merged(start, attack, SEEDS) if adapter == "new" else start, attack, sources, SEEDS,
                           lambda step, of: seen.append((step, of.lane(1)[0])))
    assert_same_adapter(found.lane(1)[0], tmp_path / "attacked", found.model)
    if layers:  # the others are those of the aligned run, in both
        aligned = load_adapter(common.adapter_dir(attack.aligned), found.model)
        attacked = load_adapter(common.adapter_dir(attack.run_dir), found.model)
        for (path, before), after in zip(*map(jax.tree_util.tree_leaves_with_path, (aligned, attacked)), strict=True):
            moved = [bool((x != y).any()) for x, y in zip(before, after[1], strict=True)]
            assert moved == [True, False, True], path
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    merged = common.load_base(model_dir, "checkpoint", attack.run_dir).frozen
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-3), found.lane(1)[1], merged)


def first_step(model_dir, config):
    """The lanes' state before the first step, and how many branches the step has that all lanes take together."""
    start = lanes.fresh(common.load_base(model_dir, "checkpoint"), config, SEEDS)
    init, step = lanes._compiled(start.model, lanes._defense_alone(config), config.optimizer(), 6, False)
    state = init(start.adapters)
    row = {name: jnp.ones((2, 2, 16), jnp.int32) for name in ("input_ids", "labels", "attention_mask")}
    keys = jax.random.split(jax.random.key(0))
    jaxpr = jax.make_jaxpr(step)(state, start.frozen, {"alignment": row, "harmful": row}, keys,
                                 None)
    conditions = [eqn for eqn in jaxprs.equations(jaxpr) if eqn.primitive.name == "cond"]
    return state, sum(eqn.invars[0].aval.shape == () for eqn in conditions)


@pytest.mark.parametrize("flags", [{"defense": "t_vaccine"}, {"defense": "booster", "base_defense": "t_vaccine"}])
def test_t_vaccine_probes_only_when_due(model_dir, flags):
    """The step number is common to all lanes, so that the schedule's branches stay branches."""
    state, branches = first_step(model_dir, align.AlignConfig(**ALIGN, **flags, model=model_dir, run_dir="-"))
    assert state.step.shape == state.defense.step.shape == ()
    assert state.defense.probabilities.shape == (2, 3)
    assert branches >= 2


def test_a_defense_that_does_not_say_what_counts_steps(model_dir, monkeypatch):
    """It loses its branches, and computes the same."""
    config = align.AlignConfig(**ALIGN, defense="t_vaccine", model=model_dir, run_dir="-", progress=False)
    _, branches = first_step(model_dir, config)
    expected, expected_metrics = aligned_lanes(model_dir, config)

    def forgetful(config):
        return lambda model: defenses.Defense(*align.make_defense(config)(model)[:3])

    monkeypatch.setattr(lanes, "make_defense", forgetful)
    lanes._compiled.cache_clear()
    try:
        state, without = first_step(model_dir, config)
        found, metrics = aligned_lanes(model_dir, config)
    finally:
        lanes._compiled.cache_clear()
    assert state.defense.step.shape == (2,) and state.step.shape == ()
    assert without == branches - 2
    for name in ("active_layers", "loss", "probabilities"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-3), found.adapters, expected.adapters)


def test_a_loss_that_is_not_finite(model_dir):
    config = align.AlignConfig(**{**ALIGN, "learning_rate": 1e30, "clip_norm": 0.0, "steps": 4}, defense="sft",
                               model=model_dir, run_dir="-")
    with pytest.raises(FloatingPointError, match="loss: found values that are not finite"):
        aligned_lanes(model_dir, config)
