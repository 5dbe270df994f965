"""Runs on a quantised backbone, from the alignment to the scores; and folders from before there were any."""

import jax
import numpy as np
import pytest

from jaxvaccine import data
from jaxvaccine.checkpoints.peft import load_adapter, read_lora_config
from jaxvaccine.experiment import inputs, lanes, stage
from jaxvaccine.experiment.align import align
from jaxvaccine.experiment.attack import attack
from jaxvaccine.experiment.carry_out import carry_out
from jaxvaccine.experiment.config import FieldError, change
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.experiment.plans import Plan
from jaxvaccine.json_files import read_json, write_json
from jaxvaccine.llama import hidden_states
from jaxvaccine.quantisation import is_quantised
from jaxvaccine.report.results import read_results
from tests.experiment.small_world import (
    align_config,
    attack_config,
    evaluate_config,
    recorded,
    settings,
    weights,
)
from tests.experiment.test_lanes import assert_same_adapter

pytestmark = pytest.mark.usefixtures("quick_compile", "compile_once")
SCORES = {"sst2_test": "", "benign_test": ""}


@pytest.fixture(scope="module")
def quantised(model_dir, tmp_path_factory):
    """The config of a finished alignment on NF4 weights."""
    config = align_config(model_dir, tmp_path_factory.mktemp("runs") / "sft", quantisation="nf4")
    align(config)
    return config


def states(base, adapter):
    ids = np.arange(12).reshape(2, 6)
    return hidden_states(base.model.clone(lora=base.lora), adapter, base.frozen, ids, np.ones_like(ids))


@pytest.mark.parametrize("adapter", ["new", pytest.param("continue", marks=pytest.mark.long)])
def test_from_alignment_to_scores(quantised, tmp_path, adapter):
    config = attack_config(quantised.run.run_dir, tmp_path / "run", adapter=adapter, learning_rate=0.05)
    attack(config)
    assert recorded(tmp_path / "run")["flags"]["quantisation"] == "nf4"
    base = stage.load_base(quantised.model.model, "checkpoint", tmp_path / "run", quantisation="nf4")
    site = base.frozen["layers"]["attention"]["q_proj"]
    assert is_quantised(base.frozen) and ("update" in site) == (adapter == "new")
    found = states(base, base.adapter)
    # What it left for PEFT is both adapters in one, on the model as it comes.
    bare = stage.load_base(quantised.model.model, "checkpoint", quantisation="nf4")
    folder = inputs.adapter_dir(tmp_path / "run")
    lora = read_lora_config(folder)
    left = load_adapter(folder, bare.model.clone(lora=lora))
    np.testing.assert_allclose(found, states(bare._replace(lora=lora), left), rtol=1e-4, atol=1e-5)
    assert np.abs(found - states(bare, None)).max() > 1e-3
    scores = evaluate_config(tmp_path / "scores", trained=tmp_path / "run", **SCORES)
    results = evaluate(scores)
    assert set(results) == {"harmful_loss", "harmful_score"} and results == evaluate(scores)
    assert recorded(tmp_path / "scores")["flags"]["quantisation"] == "nf4"
    # The loss is that of the quantised weights, not of those in the file.
    full = stage.load_base(quantised.model.model, "checkpoint")
    assert np.abs(states(full._replace(lora=lora), left) - found).max() > 1e-3


def test_what_is_asked_for_beside_a_run(quantised, tmp_path):
    scores = evaluate_config(tmp_path / "scores", trained=quantised.run.run_dir, **SCORES)
    with pytest.raises(FieldError, match=r"^quantisation: found 'int8', expected nf4, with which .* was trained"):
        evaluate(change(scores, quantisation="int8"))
    with pytest.raises(FieldError, match=r"^merge_adapter: found True, expected False: no adapter is merged into nf4"):
        evaluate(change(scores, merge_adapter=True))
    with pytest.raises(FieldError, match=r"^quantisation: found 'int4', expected one of none, int8, nf4"):
        change(scores, quantisation="int4")
    with pytest.raises(FileExistsError, match='quantisation: found "nf4", expected "none"'):
        align(change(quantised, quantisation="none"))
    assert not (tmp_path / "scores").exists()


@pytest.mark.long
@pytest.mark.parametrize("adapter", ["new", "continue"])
def test_lanes(quantised, tmp_path, adapter):
    """The codes are all lanes' own, the frozen adapters each lane's."""
    seeds = (3, 1)
    aligned = [change(quantised, run_dir=str(tmp_path / f"aligned{seed}"), seed=seed, steps=2) for seed in seeds]
    configs = [attack_config(align(of), tmp_path / f"attacked{of.run.seed}", adapter=adapter, seed=of.run.seed)
               for of in aligned]
    for config in configs:
        attack(config)
    base = stage.load_base(quantised.model.model, "checkpoint", quantisation="nf4")
    start = lanes.fresh(base, quantised.adapter.lora(), quantised.model, seeds)
    start = start._replace(adapters=lanes.stack([
        load_adapter(inputs.adapter_dir(of.run.run_dir), start.model) for of in aligned]))
    if adapter == "new":
        start = lanes.merged(start, quantised.adapter.lora(), seeds)
        codes, shared = (tree["layers"]["mlp"]["up_proj"]["kernel"].codes for tree in (start.frozen, base.frozen))
        assert codes is shared
    tokenizer = data.load_tokenizer(quantised.model.model)
    sources = []
    for config in configs:
        rows = data.poison(data.load_examples(config.data.user_data), data.load_examples(config.data.harmful_data),
                           16, 0.25, config.run.seed)
        sources.append({"user": (data.tokenize_examples(
            tokenizer, rows, config.data.max_length, quantised.data.prompt), config.training.batch_size)})
    found, _ = lanes.train(start, configs[0].method, configs[0].training, configs[0].data.bucket, sources, seeds)
    trained = inputs.TRAINED if adapter == "new" else inputs.ADAPTER
    for i, config in enumerate(configs):
        lane_adapter, frozen = found.lane(i)
        assert_same_adapter(lane_adapter, tmp_path / f"attacked{config.run.seed}", found.model, trained)
        run = stage.load_base(quantised.model.model, "checkpoint", config.run.run_dir, quantisation="nf4")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), frozen, run.frozen)


@pytest.mark.long
def test_a_plan(model_dir, tmp_path):
    """Of cells with and without, one by one and as lanes: the same scores of the same cells."""
    plan = Plan((model_dir,), (("sft", "poison_ratio=0.25:adapter=new"),
                               ("sft:quantisation=int8", "poison_ratio=0.25:adapter=new")))
    of = settings(model_dir, benign_test="")
    tables = []
    for as_lanes in (False, True):
        root = tmp_path / str(as_lanes)
        carry_out(plan, of, root, as_lanes=as_lanes, say=lambda line: None)
        rows = read_results(root)
        tables.append(rows[(rows.measure == "harmful_loss") & (rows.stage != "backbone")])
    values = [dict(zip(zip(of.method, of.stage, strict=True), of.value.astype(float), strict=True)) for of in tables]
    assert len(values[0]) == 4 and values[0].keys() == values[1].keys()
    for key, value in values[0].items():
        assert value == pytest.approx(values[1][key], rel=1e-3)
    assert values[0]["sft", "attack"] != values[0]["sft:quantisation=int8", "attack"]


def before_there_was_such_a_flag(run_dir):
    """The run's config.json as an earlier version has written it."""
    config = recorded(run_dir)
    del config["flags"]["quantisation"]
    config["results"]["config"] = inputs._hash(config)
    write_json(run_dir / "config.json", config)


def test_runs_from_before(model_dir, tmp_path):
    """They go on, are attacked and scored; and stay those of full weights."""
    config = align_config(model_dir, tmp_path / "run")
    align(config)
    before_there_was_such_a_flag(tmp_path / "run")
    left = weights(tmp_path / "run")
    assert align(config) == tmp_path / "run" and weights(tmp_path / "run") == left
    with pytest.raises(FileExistsError, match='quantisation: found "none", expected "nf4"'):
        align(change(config, quantisation="nf4"))
    attack(attack_config(tmp_path / "run", tmp_path / "attacked"))
    assert recorded(tmp_path / "attacked")["flags"]["quantisation"] == "none"
    scores = evaluate_config(tmp_path / "scores", trained=tmp_path / "attacked", **SCORES)
    results = evaluate(scores)
    flags = read_json(tmp_path / "scores" / "config.json")
    del flags["flags"]["quantisation"]
    write_json(tmp_path / "scores" / "config.json", flags)
    assert evaluate(scores) == results
