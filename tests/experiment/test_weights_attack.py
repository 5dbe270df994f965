"""Attacks on the weights themselves: all of them train, none does, or the refusal direction is projected out."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxvaccine import llama, memory
from jaxvaccine.checkpoints.hugging_face import load_model
from jaxvaccine.data import load_examples
from jaxvaccine.experiment import ablation, dry_run, inputs, stage, whole
from jaxvaccine.experiment.attack import attack
from jaxvaccine.experiment.carry_out import carry_out
from jaxvaccine.experiment.checks import check_plan
from jaxvaccine.experiment.config import FieldError, change
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.experiment.plans import Plan
from jaxvaccine.report import runs as reports
from jaxvaccine.report.results import read_results
from tests import tiny
from tests.attacks.test_refusal_ablation import prompts as drawn_prompts
from tests.experiment import small_world
from tests.experiment.small_world import attack_config, changed, evaluate_config, other_weights, recorded

pytestmark = pytest.mark.usefixtures("quick_compile")

HARMLESS = "world_benign@train[0:20]"
KEY = ["method", "attack", "seed", "stage", "step", "measure"]
ABLATED = {"trains": "nothing", "ablate": "before", "harmless_data": HARMLESS}
P = "poison_ratio=0.25"
NOTHING = ("trains=nothing:ablate=before", "trains=nothing")
QUICK = {"sft": ("trains=all:only_layers=1+2:ablate=after", *NOTHING)}
LONG = {"sft": ("ablate=before", "ablate=after:adapter=continue", "trains=all:ablate=before", "trains=nothing"),
        "sft+lisa": ("trains=all",), "sft+kl": ("trains=all",)}


@pytest.mark.long
@pytest.mark.parametrize("texts", [QUICK, LONG])
def test_lanes_are_the_runs(model_dir, tmp_path, texts):
    """Every lane has its own weights and its own direction, and is scored with them."""
    settings = small_world.settings(model_dir, benign_test="", sst2_test="")
    settings = settings._replace(attack={
        name: {**values, "harmless_data": HARMLESS} for name, values in settings.attack.items()})
    pairs = tuple((method, f"{P}:{text}") for method, of in texts.items() for text in of)
    tables = []
    for as_lanes, seeds in ((False, (5,)), (True, (0, 5))):
        root = tmp_path / f"lanes-{as_lanes}"
        carry_out(Plan((model_dir,), pairs, seeds), settings, root, as_lanes=as_lanes, say=lambda line: None)
        tables.append(read_results(root))
    both = [table[table["measure"].isin(("harmful_loss", "harmful_score"))] for table in tables]
    one, many = (table[table["seed"] == 5].sort_values(KEY, ignore_index=True) for table in both)
    pd.testing.assert_frame_equal(one[KEY], many[KEY])
    loss = one["measure"] == "harmful_loss"
    np.testing.assert_allclose(many.loc[loss, "value"], one.loc[loss, "value"], rtol=1e-4)
    pd.testing.assert_frame_equal(one.loc[~loss], many.loc[~loss])
    attacked = one[loss & (one["stage"] == "attack")].set_index(["method", "attack"])
    assert attacked["value"].nunique() == len(attacked) == len(pairs)
    # Without any training it is the aligned model, scored once, after no step.
    assert all((attacked.loc[pair, "step"] == 0) == ("nothing" in pair[1]) for pair in pairs)
    aligned = one[loss & (one["stage"] == "alignment") & (one["method"] == "sft")]["value"].item()
    assert attacked.loc[("sft", f"{P}:trains=nothing"), "value"] == pytest.approx(aligned, rel=1e-6)
    lanes = both[1][(both[1]["stage"] == "attack") & (both[1]["measure"] == "harmful_loss")]
    assert lanes["value"].nunique() == len(lanes) == 2 * len(pairs), "both seeds, both apart"
    for table in tables:  # learning rate times LoRA scale: whatever trains no adapter has none
        budgets = table[(table["stage"] == "attack") & (table["measure"] == "budget")]
        assert set(budgets["attack"]) == {text for _, text in pairs if "trains=" not in text}


def layers_that_moved(found, start):
    return [any(bool((x[i] != y[i]).any()) for x, y in zip(*map(jax.tree.leaves, (found["layers"], start["layers"])),
                                                           strict=True)) for i in range(3)]


@pytest.fixture(scope="module")
def run(aligned, tmp_path_factory):
    """The config of an attack on all weights of two layers, and its finished folder."""
    config = attack_config(aligned.run.run_dir, tmp_path_factory.mktemp("all") / "run", trains="all", steps=3,
                           only_layers=("0", "2"), save_every=1)
    return config, attack(config)


def test_what_a_run_on_all_weights_leaves(run, aligned, model_dir):
    config, folder = run
    assert {path.name for path in folder.iterdir()} == {"checkpoints", "config.json", "metrics.jsonl", "model"}
    found = recorded(folder)
    assert found["steps"] == 3 and set(found["results"]) == {"model", "config"}
    assert set(found["results"]["model"]) == {"weights", "config", "tokenizer"}
    base = stage.load_base(model_dir, "checkpoint", folder)
    assert base.adapter is None and base.lora is None
    start = stage.load_base(model_dir, "checkpoint", aligned.run.run_dir, merge=True).frozen
    assert layers_that_moved(base.frozen, start) == [True, False, True]
    for name in ("embed_tokens", "norm", "lm_head"):
        jax.tree.map(np.testing.assert_array_equal, base.frozen[name], start[name])
    # It is a model like any other.
    jax.tree.map(np.testing.assert_array_equal, load_model(folder / "model")[1], base.frozen)
    scores = evaluate(evaluate_config(folder.with_name("scores"), trained=folder))
    alone = evaluate(evaluate_config(folder.with_name("alone"), model=str(folder / "model")))
    assert scores == alone
    reports.write(folder)
    assert "All weights trained. The result is the whole model in model/" in reports.read(folder)
    assert attack(config) == folder  # it has finished


def test_it_continues_from_a_checkpoint(run, tmp_path):
    config, folder = run
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "3")
    assert not inputs.is_finished(again)
    attack(change(config, run_dir=str(again)))
    assert len((again / "metrics.jsonl").read_text().splitlines()) == 3
    assert (again / "model" / "model.safetensors").read_bytes() == (folder / "model" / "model.safetensors").read_bytes()


def test_a_model_that_has_changed_is_refused(run):
    _, folder = run
    with changed(folder / "model" / "model.safetensors", other_weights), pytest.raises(
            FieldError, match=r"^trained: found '.*run', a run that has changed .* results\.model\.weights\.model"):
        evaluate(evaluate_config(folder.with_name("a"), trained=folder))


def test_the_direction_is_out_of_the_model(aligned, model_dir, tmp_path):
    """Of the aligned model's own prompts, at the layer that is recorded; asked for, at another."""
    config = attack_config(aligned.run.run_dir, tmp_path / "run", **ABLATED)
    attack(config)
    found = recorded(tmp_path / "run")
    assert found["steps"] == 0 and len(found["data"]["prompts"]["harmless"]) == 20
    assert found["ablation"]["layer"] == 1 + int(np.argmax(found["ablation"]["separations"][1:]))
    start = stage.load_base(model_dir, "checkpoint", aligned.run.run_dir, merge=True)
    tokenizer = stage.load_tokenizer(model_dir)
    prompts = ablation.encode(tokenizer, config.ablation, load_examples(config.data.harmful_data), "distinct", "alpaca")
    direction = ablation.find(config.ablation, prompts, start.model, None, start.frozen)
    base = stage.load_base(model_dir, "checkpoint", tmp_path / "run")
    after, before = (np.abs(of.frozen["layers"]["mlp"]["down_proj"]["kernel"] @ direction.r).max()
                     for of in (base, start))
    assert after < 1e-6 < 0.01 < before
    other = attack(change(config, run_dir=str(tmp_path / "other"), ablation_layer=3 - found["ablation"]["layer"]))
    assert recorded(other)["ablation"]["layer"] == 3 - found["ablation"]["layer"]
    reports.write(other)
    report = reports.read(other)
    assert "Nothing trained. The refusal direction before layer" in report
    assert "Trained on" not in report and "metrics.jsonl" not in report
    account = recorded(other)["data"]["accounts"]["harmful"]["world_harmful@attack[0:20]"]
    assert account["examples"] == 20 and account["trained"] is None


def test_dry_runs(run, aligned, tmp_path):
    """No figure that is of an adapter: the state is counted as it is, and a model has no adapter beside it."""
    config, folder = run
    dry = dry_run.DryRun(dry_run=True, card="rtx_3090")
    said = dry_run.of_attack(change(config, run_dir=str(tmp_path / "a")), dry)
    assert said.startswith("3 steps that train all weights") and "of training all weights there is no formula" in said
    weights = memory.tree_bytes(load_model(folder / "model")[1])
    counted, state = dry_run.memory.all_weights_bytes(load_model(folder / "model")[0], config.method)
    assert counted == weights, "float32"
    assert 3 * weights <= state < 3.01 * weights, "with both moments"
    nothing = dry_run.of_attack(attack_config(aligned.run.run_dir, tmp_path / "b", **ABLATED), dry)
    assert nothing == "0 steps: nothing trains"
    assert "adapter" not in dry_run.of_evaluation(evaluate_config(tmp_path / "c", trained=folder), dry)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("given, message", [
    ({"ablate": "before"}, "^harmless_data: found '', expected a data source, which --ablate=before needs"),
    ({"ablate": "after", "harmless_data": "nothing"}, "^harmless_data: data source nothing: found kind"),
    ({"harmless_data": HARMLESS}, "^harmless_data: found .*, expected nothing: .*ablate=none"),
    ({"ablate": "after", "harmless_data": HARMLESS, "harmful_data": "", "poison_ratio": 0.0},
     "^harmful_data: found '', expected a data source, which --ablate=after needs")])
def test_settings_that_are_no_attack(given, message):
    with pytest.raises(FieldError, match=message):
        attack_config("aligned", "run", **given)


@pytest.mark.parametrize("given, message", [
    ({"trains": "all"}, "^trains: found 'all', expected adapter: ewc holds the aligned adapter"),
    ({"ablate": "before", "harmless_data": HARMLESS}, "^ablate: found 'before', expected none or after: ewc holds")])
def test_ewc_holds_the_adapter(aligned, tmp_path, given, message):
    with pytest.raises(FieldError, match=message):
        attack(attack_config(aligned.run.run_dir, tmp_path / "a", adapter="auto", defense="ewc",
                             alignment_data="world_refusal@train[0:8]", **given))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("given, name", [({"trains": "all"}, "trains"), (ABLATED, "ablate")])
def test_weights_that_do_not_change(given, name):
    config = attack_config("aligned", "run", **given)
    with pytest.raises(FieldError, match=rf"^{name}: found '.*', expected .*: the model was aligned on nf4 weights"):
        config.check_weights(tiny.CONFIG, "nf4")
    attack_config("aligned", "run").check_weights(tiny.CONFIG, "nf4")


def test_models_that_can_not_be_ablated():
    config = attack_config("aligned", "run", **ABLATED)
    with pytest.raises(FieldError, match=r"^ablate: found 'before', expected none: the model has a norm .*\(gemma2\)"):
        config.check_weights(tiny.FAMILIES["gemma2"], "none")
    with pytest.raises(FieldError, match=r"^ablation_layer: found 4, expected a number below 4"):
        change(config, ablation_layer=4).check_weights(tiny.CONFIG, "none")


@pytest.mark.parametrize("given, message", [
    ({"trains": "nothing", "only_layers": ("0",)}, "only_layers: found ('0',), expected none with --trains=nothing"),
    ({"trains": "nothing", "user_rows": "similar", "candidates": 20}, "user_rows: found 'similar', expected drawn"),
    ({"trains": "all", "objective": "meta"}, "objective: found 'meta', expected plain with --trains=all"),
    ({"trains": "nothing", "objective": "steepen"}, "objective: found 'steepen', expected plain with --trains=nothing"),
])
def test_what_has_no_place_without_an_adapter(given, message):
    with pytest.raises(FieldError) as error:
        attack_config("aligned", "run", **given)
    assert str(error.value).startswith(message)


def test_a_plan_refuses_them_first(model_dir, tmp_path):
    """Before anything is aligned, and by the attack's name."""
    settings = small_world.settings(model_dir)
    plan = Plan((model_dir,), (("sft:quantisation=nf4", "poison_ratio=0.25:trains=all"),), (0,))
    for as_lanes in (False, True):
        with pytest.raises(FieldError, match=r"^attacks: found 'poison_ratio=0\.25:trains=all': trains: found 'all', "):
            check_plan(plan, settings, tmp_path, as_lanes, lambda aligned, attacked: None)


def test_runs_from_before_these_settings(aligned, tmp_path):
    """A folder of an earlier version has neither flag, and is the same run."""
    config = attack_config(aligned.run.run_dir, tmp_path / "run", steps=1)
    attack(config)
    path = tmp_path / "run" / "config.json"
    found = json.loads(path.read_text())
    for name in ("trains", "ablate"):
        del found["flags"][name]
    path.write_text(json.dumps(found))
    attack(config)
    with pytest.raises(FileExistsError, match="trains: found \"adapter\", expected \"all\""):
        attack(change(config, trains="all"))


def test_logits_of_a_tied_model_keep_their_head():
    """After an ablation its head is the embedding as it was."""
    config = dataclasses.replace(tiny.CONFIG, tie_word_embeddings=True)
    model = llama.Llama(config)
    frozen = llama.init_frozen(model, jax.random.key(0))
    part = attack_config("a", "r", **ABLATED).ablation
    base, _ = whole.ablated(stage.Base(model, frozen, None, None), part, ablation.Prompts(*map(drawn_prompts, (0, 1))))
    hidden = jnp.ones(config.hidden_size)
    found, expected = (llama.token_logits(of, weights, hidden) for of, weights in (
        (base.model, base.frozen), (model, frozen)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (base.frozen["embed_tokens"] != frozen["embed_tokens"]).any()
