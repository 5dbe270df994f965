"""A lane computes what `align` and `attack` compute for its seed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine import data, defenses, optim
from jaxvaccine.checkpoints.peft import load_adapter
from jaxvaccine.experiment import inputs, lanes, stage
from jaxvaccine.experiment.align import align, batch_sources, load_data, tokenize
from jaxvaccine.experiment.attack import attack
from jaxvaccine.experiment.config import change, flat
from jaxvaccine.experiment.methods import Sft, TVaccine
from jaxvaccine.llama_config import LoraConfig
from tests import jaxprs, tiny
from tests.experiment.small_world import align_config, attack_config

pytestmark = pytest.mark.usefixtures("quick_compile")

SEEDS = (3, 1)
METHODS = {
    "sft": {"defense": "sft"},
    "t_vaccine_released": {"defense": "t_vaccine", "freeze": "released"},
    "booster": {"defense": "booster", "base_defense": "t_vaccine"},
}


def config_of(model_dir, run_dir="-", **given):
    return align_config(model_dir, run_dir, **{"steps": 6, "alignment_data": "world_refusal@train[0:40]", **given})


def aligned_lanes(config, method=None, **bar):
    """The config's run with both seeds; with another method, if one is given."""
    model = config.model.model
    tokenized = tokenize(data.load_tokenizer(model), load_data(config.data, config.method), config.data)
    sources = batch_sources(config.method, tokenized, config.training.batch_size, config.data.harmful_batch_size)
    start = lanes.fresh(stage.load_base(model, "checkpoint"), config.adapter.lora(), config.model, SEEDS)
    return lanes.train(start, method or config.method, config.training, config.data.bucket, [sources] * len(SEEDS),
                       SEEDS, **bar)


def assert_same_adapter(found, run_dir, model, of=inputs.ADAPTER):
    """All elements but one in a hundred: Adam divides by a gradient's size, and what is nothing but rounding becomes a
    step in either direction.
    """
    expected = load_adapter(run_dir / of, model)
    jax.tree.map(lambda x, y: np.testing.assert_array_less(
        np.quantile(np.abs(x - y), 0.99), 1e-3 * np.abs(y).max()), found, expected)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name != "sft"))
                                  for name in METHODS])
def test_lanes_are_the_runs_of_align(model_dir, tmp_path, capsys, name):
    config = config_of(model_dir, **METHODS[name])
    found, metrics = aligned_lanes(config, progress=True, description="both seeds")
    assert "both seeds: 100%" in (bar := capsys.readouterr().err) and "6/6" in bar
    align(change(config, run_dir=str(tmp_path / "run"), seed=SEEDS[1]))
    assert_same_adapter(lanes.take(found.adapters, 1), tmp_path / "run", found.model)
    assert metrics["loss"].shape == (6, 2)
    assert not np.allclose(metrics["loss"][:, 0], metrics["loss"][:, 1])


@pytest.mark.parametrize("adapter, layers, defense", [
    ("new", None, "none"), *(pytest.param(*each, marks=pytest.mark.long) for each in (
        ("continue", ("2", "0"), "none"), ("continue", None, "none"), ("new", None, "lisa")))])  # the first with Muon
def test_lanes_are_the_runs_of_attack(model_dir, tmp_path, adapter, layers, defense):
    aligned = config_of(model_dir)
    align(change(aligned, run_dir=str(tmp_path / "aligned"), seed=SEEDS[1]))
    rows = {"alignment_data": "world_refusal@train[0:8]"} if defense == "lisa" else {}
    config = attack_config(tmp_path / "aligned", tmp_path / "attacked", adapter=adapter, only_layers=layers,
                           seed=SEEDS[1], steps=3, defense=defense, optimizer="muon" if layers else "adamw", **rows)
    attack(config)
    # After it: a new adapter donates the base that it finds loaded.
    start, _ = aligned_lanes(aligned)
    resolved = config.adapter.resolve(flat(aligned), config.method)
    tokenizer = data.load_tokenizer(model_dir)
    more = {name: data.load_examples(source) for name, source in (("alignment", rows.get("alignment_data")),) if source}
    sources = [{name: (of, 4) for name, of in tokenize(tokenizer, {"user": data.poison(
        data.load_examples(config.data.user_data), data.load_examples(config.data.harmful_data), 16, 0.25, seed),
        **more}, aligned.data).items()} for seed in SEEDS]
    seen = []
    found, _ = lanes.train(
        lanes.merged(start, resolved.sites().lora(), SEEDS) if adapter == "new" else start, config.method,
        config.training, config.data.bucket, sources, SEEDS, resolved.layer_mask(3),
        lambda step, of: seen.append((step, of.lane(1)[0])))
    trained = inputs.TRAINED if adapter == "new" else inputs.ADAPTER
    assert_same_adapter(found.lane(1)[0], tmp_path / "attacked", found.model, trained)
    if layers:  # the others are those of the aligned run, in both
        trees = [load_adapter(inputs.adapter_dir(tmp_path / name), found.model) for name in ("aligned", "attacked")]
        for (path, before), after in zip(*map(jax.tree_util.tree_leaves_with_path, trees), strict=True):
            moved = [bool((x != y).any()) for x, y in zip(before, after[1], strict=True)]
            assert moved == [True, False, True], path
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    merged = stage.load_base(model_dir, "checkpoint", tmp_path / "attacked").frozen
    assert tiny.relative_difference(found.lane(1)[1], merged) < 1e-3


def test_attacks_that_differ_in_numbers_compile_one_step(model_dir):
    """In learning rate, schedule, steps, decay and clipping, and in layers; not in the optimizer."""
    base = attack_config("a", "-", bucket=64)
    tokenized = tokenize(data.load_tokenizer(model_dir), {"user": data.load_examples(base.data.user_data)[:16]},
                         change(config_of(model_dir), bucket=64).data)
    start = lanes.fresh(stage.load_base(model_dir, "checkpoint"), LoraConfig(rank=2), config_of(model_dir).model, SEEDS)
    lanes.compiled.cache_clear()
    masks = np.array([[True, False, True], [False, True, True]])
    for given, layers in (({}, masks), ({"learning_rate": 1e-2, "schedule": "cosine", "warmup_ratio": 0.5, "steps": 3,
                                         "weight_decay": 0.01, "clip_norm": 0.5}, masks[0]),
                          ({"optimizer": "sgd"}, masks)):
        config = change(base, **given)
        found, _ = lanes.train(start, config.method, config.training, 64, [{"user": (tokenized["user"], 4)}] * 2,
                               SEEDS, layers)
        for leaf, first in zip(*map(jax.tree.leaves, (found.adapters, start.adapters)), strict=True):
            moved = np.asarray(leaf != first).any(axis=(2, 3))
            np.testing.assert_array_equal(moved, np.broadcast_to(layers, (2, 3)))
    steps = [lanes.compiled(start.model, base.method, kind, 1, False, objective=base.objective)[1]._cache_size()
             for kind in ("adamw", "sgd")]
    assert steps == [1, 1] and lanes.compiled.cache_info().misses == 2


def test_lisa_reads_how_many_steps_a_run_makes():
    given = {"alignment_data": "world_refusal@train"}
    methods = [attack_config("a", "-", defense=name, **given).method for name in ("lisa", "ewc")] + [Sft()]
    assert [lanes.steps_read(method, 7) for method in methods] == [7, 1, 1]


@pytest.fixture
def as_a_batch(monkeypatch):
    """Lanes as accelerators have them."""
    monkeypatch.setattr(lanes, "take_turns", lambda: False)
    lanes.compiled.cache_clear()
    yield
    lanes.compiled.cache_clear()


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
def test_taking_turns_is_vmap(in_axes):
    def function(x, y):
        return {"sum": x["a"] + y["b"], "product": jnp.vdot(x["a"], y["b"])}

    rng = np.random.default_rng(0)
    x, y = ({name: rng.normal(size=(3, 4) if axis == 0 else 4)} for name, axis in zip("ab", in_axes, strict=True))
    expected, found = jax.jit(jax.vmap(function, in_axes))(x, y), jax.jit(lanes.over_lanes(function, in_axes))(x, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.long
def test_lanes_as_a_batch(model_dir, request):
    config = config_of(model_dir, **METHODS["booster"])
    expected, expected_metrics = aligned_lanes(config)
    request.getfixturevalue("as_a_batch")
    found, metrics = aligned_lanes(config)
    assert tiny.relative_difference(found.adapters, expected.adapters) < 1e-3
    np.testing.assert_array_equal(metrics["active_layers"], expected_metrics["active_layers"])


def first_step(config, method):
    """The lanes' state before the first step, and how many branches the step has that all lanes take together."""
    start = lanes.fresh(stage.load_base(config.model.model, "checkpoint"), config.adapter.lora(),
                        dataclasses.replace(config.model, remat="none"), SEEDS)
    init, step = lanes.compiled(start.model, method, "adamw", 1, False)
    state = jax.eval_shape(init, start.adapters)
    row = {name: jnp.ones((2, 2, 16), jnp.int32) for name in ("input_ids", "labels", "attention_mask")}
    keys = jax.random.split(jax.random.key(0))
    batches, scalars = {"alignment": row, "harmful": row}, optim.Scalars(0.1, 0.1, 1.0)
    jaxpr = jax.make_jaxpr(step)(state, start.frozen, batches, keys, scalars)
    conditions = [eqn for eqn in jaxprs.equations(jaxpr) if eqn.primitive.name == "cond"]
    return state, sum(eqn.invars[0].aval.shape == () for eqn in conditions)


@pytest.mark.parametrize("given", [{"defense": "t_vaccine"}, {"defense": "booster", "base_defense": "t_vaccine"}])
def test_t_vaccine_probes_only_when_due(model_dir, as_a_batch, given):
    """The step number is common to all lanes, so that the schedule's branches stay branches."""
    config = config_of(model_dir, **given)
    state, branches = first_step(config, config.method)
    assert state.step.shape == state.defense.step.shape == ()
    assert state.defense.probabilities.shape == (2, 3)
    assert branches >= 2


@dataclasses.dataclass(frozen=True)
class Forgetful(TVaccine):
    """T-Vaccine that does not say what counts steps."""

    def make(self, model):
        return defenses.Defense(*super().make(model)[:3])


@pytest.mark.long
def test_a_defense_that_does_not_say_what_counts_steps(model_dir, as_a_batch):
    """It loses its branches, and computes the same."""
    config = config_of(model_dir, defense="t_vaccine")
    forgetful = Forgetful(**vars(config.method))
    _, branches = first_step(config, config.method)
    state, without = first_step(config, forgetful)
    assert state.defense.step.shape == (2,) and state.step.shape == ()
    assert without == branches - 2
    expected, expected_metrics = aligned_lanes(config)
    found, metrics = aligned_lanes(config, forgetful)
    for name in ("active_layers", "loss", "probabilities"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5, atol=1e-6)
    assert tiny.relative_difference(found.adapters, expected.adapters) < 1e-3


def test_a_loss_that_is_not_finite(model_dir):
    with pytest.raises(FloatingPointError, match="loss: found values that are not finite"):
        aligned_lanes(config_of(model_dir, learning_rate=1e30, clip_norm=0.0, steps=4))
