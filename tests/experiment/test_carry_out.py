"""Plans carried out, cell by cell and as lanes: one folder layout, one table; what is there stays as it is."""

import dataclasses
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxvaccine.checkpoints.peft import save_adapter
from jaxvaccine.data import fingerprint, load_tokenizer
from jaxvaccine.evaluation import score_answers
from jaxvaccine.experiment import inputs, lane_scores, lanes, results, runs
from jaxvaccine.experiment import lane_cells as module
from jaxvaccine.experiment.carry_out import carry_out
from jaxvaccine.experiment.checks import check_plan
from jaxvaccine.experiment.config import FieldError
from jaxvaccine.experiment.methods import Sft, TVaccine
from jaxvaccine.experiment.plan_folder import Probes, collect, result_path
from jaxvaccine.experiment.plans import Plan, Settings, folder_name
from jaxvaccine.experiment.results import Cell
from jaxvaccine.json_files import read_json
from jaxvaccine.report import runs as reports
from jaxvaccine.report.results import read_results
from tests.experiment import small_world

pytestmark = pytest.mark.usefixtures("quick_compile")

P = "poison_ratio=0.25"
SEEDS = (0, 5)
SEEDS_OF = {False: (5,), True: SEEDS}  # by whether they are lanes: of two lanes the second, cell by cell
SCORES = ["harmful_loss", "harmful_score", "harmful_score_plus", "no_answer", "over_refusal", "sst2", "unread"]
KEY = ["method", "attack", "seed", "stage", "step", "measure"]


def quiet(*args):
    """In the place of print."""


def go(plan, settings, root, **more):
    carry_out(plan, settings, root, **{"say": quiet, **more})
    return read_results(root)


def files_of(root):
    """{path: (when it was written, its bytes)} of what the cells of a plan left."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*")
            if path.is_file() and path.parent != root}


def names_in(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def settings(model_dir):
    return small_world.settings(model_dir)


@pytest.fixture(scope="module")
def harm_alone(model_dir):
    """The same, scored on harm and no task."""
    return small_world.settings(model_dir, sst2_test="", benign_test="")


@pytest.fixture(scope="module")
def both(model_dir, settings, tmp_path_factory):
    """{as lanes?: (folder, table)} of the same plan, cell by cell for one of the lanes' seeds."""
    pairs = (("sft", P), ("sft", "poison_ratio=0.5:adapter=new"), ("sft:steps=2", ""), ("sft+lisa", P))
    found = {}
    for as_lanes, seeds in SEEDS_OF.items():
        plan = Plan((model_dir,), pairs, seeds)
        root = tmp_path_factory.mktemp("plan") / "run"
        found[as_lanes] = root, go(plan, settings, root, as_lanes=as_lanes, score_backbones=True)
    return found


def test_both_ways_give_the_same_table(both):
    one, many = (table[table["measure"].isin(SCORES)] for _, table in (both[False], both[True]))
    assert len(many) == 7 * (1 + 2 * (3 + 3))  # the backbone; of both seeds three methods' alignments, three attacks
    of_lanes = many.loc[many["measure"] == "harmful_loss", "value"]
    assert of_lanes.nunique() == 1 + 2 * 2 + 2 * 3, "runs that are alike would show nothing"
    many = many[(many["seed"] == 5) | (many["stage"] == "backbone")]
    one, many = (table.sort_values(KEY, ignore_index=True) for table in (one, many))
    assert set(one["measure"]) == set(SCORES)
    numbers = ["value", "n", "low", "high"]
    pd.testing.assert_frame_equal(one.drop(columns=numbers), many.drop(columns=numbers))
    loss = one["measure"] == "harmful_loss"
    np.testing.assert_allclose(many.loc[loss, "value"], one.loc[loss, "value"], rtol=1e-4)
    pd.testing.assert_frame_equal(one.loc[~loss, numbers], many.loc[~loss, numbers])


def test_the_table_is_that_of_the_cells(both, model_dir):
    for root, table in both.values():
        rows = [row for path in root.rglob("*.json") if path.name.startswith(("poison", "aligned.json", "none.json"))
                for row in read_json(path)["rows"] if path.parent.name != "none-scores"]
        pd.testing.assert_frame_equal(
            results.table(rows).sort_values([*KEY, "layer"], ignore_index=True),
            table.sort_values([*KEY, "layer"], ignore_index=True), check_dtype=False)
        assert set(table["backbone"]) == {model_dir}
        backbone = table[table["stage"] == "backbone"]
        assert set(backbone["method"]) == {"none"} and set(backbone["measure"]) == set(SCORES)
        attacked = table[table["stage"] == "attack"]
        assert set(attacked["step"]) == {2} and not (attacked["method"] == "sft:steps=2").any()


def test_folders(both, model_dir):
    """<backbone>/<method>/seed<k>/aligned with an adapter, and beside it a file of every cell's rows."""
    cells = {"aligned.json", f"{P}.json", "poison_ratio=0.5_adapter=new.json"}
    for as_lanes, (root, _) in both.items():
        backbone = root / folder_name(model_dir)
        assert {"config.json", results.TABLE, folder_name(model_dir)} == names_in(root)
        scores = set() if as_lanes else {f"{name}-scores" for name in ("aligned", P, "poison_ratio=0.5_adapter=new")}
        runs_there = set() if as_lanes else {P, "poison_ratio=0.5_adapter=new"}
        for seed in SEEDS_OF[as_lanes]:
            assert names_in(backbone / "sft" / f"seed{seed}") == {"aligned", *cells, *scores, *runs_there}
            adapter = backbone / "sft_steps=2" / f"seed{seed}" / "aligned" / "adapter" / "adapter_model.safetensors"
            assert adapter.stat().st_size > 100
            # Lisa's model was aligned as SFT's.
            assert not (backbone / "sft+lisa" / f"seed{seed}" / "aligned").exists()
            assert {"aligned.json", f"{P}.json"} <= names_in(backbone / "sft+lisa" / f"seed{seed}")
        assert {"none.json", "none-scores", "sft", "sft+lisa", "sft_steps=2"} == names_in(backbone)
    run = both[False][0] / folder_name(model_dir) / "sft" / "seed5" / P
    assert {"config.json", "metrics.jsonl", "adapter", "checkpoints"} <= names_in(run)
    assert runs.read_config(run)["script"] == "finetune"
    assert len((run.with_name(f"{P}-scores") / "predictions_sst2.jsonl").read_text().splitlines()) == 4


def test_a_defense_of_the_fine_tuning_shares_the_alignment(both):
    for _, table in both.values():
        aligned = table[(table["stage"] == "alignment") & table["measure"].isin(SCORES)]
        sft, lisa = (aligned[aligned["method"] == name].drop(columns="method").reset_index(drop=True)
                     for name in ("sft", "sft+lisa"))
        pd.testing.assert_frame_equal(sft, lisa)
        attacked = table[(table["stage"] == "attack") & (table["measure"] == "harmful_loss") & (table["attack"] == P)]
        values = {name: rows["value"].tolist() for name, rows in attacked.groupby("method")}
        assert set(values) == {"sft", "sft+lisa"} and not np.isclose(values["sft"], values["sft+lisa"]).any()


@pytest.mark.parametrize("as_lanes", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_plan_grows(model_dir, harm_alone, tmp_path, as_lanes):
    """Other methods, attacks and seeds; what is there is not touched, and a cell that is gone is made again alike."""
    def plan(*pairs, seeds=(0,)):
        return Plan((model_dir,), pairs, seeds, (1, 2) if as_lanes else ())

    root, said, written = tmp_path / "plan", [], []

    def again(*pairs, **more):
        said.clear()
        written.clear()
        return go(plan(*pairs, **more), harm_alone, root, as_lanes=as_lanes, say=said.append, written=written.append)

    again(("sft", P))
    before = files_of(root)
    cell = Cell(model_dir, "sft", P, 0)
    found = read_json(result_path(root, cell))
    steps = {row["step"] for row in found["rows"]}
    assert steps == ({1, 2} if as_lanes else {2})
    assert len(said) == 1 and said[0].startswith(f"{model_dir} sft {P}, seed 0: harmful_loss ") and root in written
    if as_lanes:
        assert len(found["answers"]["1"]["harmful_score"]) == lane_scores.SHOWN and written == [root]
    else:
        assert set(written) == {root, *(root / folder_name(model_dir) / "sft" / "seed0" / name for name in (
            "aligned", "aligned-scores", P, f"{P}-scores"))}
    again(("sft", P))
    assert files_of(root) == before and not said and not written

    result_path(root, cell).unlink()
    again(("sft", P))
    after = files_of(root)
    assert after.pop(result_path(root, cell))[1] == before[result_path(root, cell)][1]
    assert after.items() <= before.items()
    before = files_of(root)
    table = again(("sft", P), ("sft", "poison_ratio=0.5"), ("sft:steps=2", ""), seeds=SEEDS)
    after = files_of(root)
    assert before.items() <= after.items()
    keys = set(zip(*(table[name] for name in ("method", "attack", "seed")), strict=True))
    assert keys == {(method, attack, seed) for seed in SEEDS for method, attack in (
        ("sft", ""), ("sft", P), ("sft", "poison_ratio=0.5"), ("sft:steps=2", ""))}
    # The table and the report are of the plan as it is now.
    reports.write(root)
    assert "| SFT (steps = 2) | aligned | " in reports.read(root) and "p = 0.5" in reports.read(root)
    assert len(again(("sft:steps=2", ""))["method"].unique()) == 1
    assert files_of(root) == after


def test_an_interrupted_plan_goes_on(model_dir, harm_alone, tmp_path):
    """Whatever it was doing, what it has is in the table, and it ends as one that was not interrupted."""
    plan = Plan((model_dir,), (("sft", P), ("sft", "poison_ratio=0")), (0,))
    whole = go(plan, harm_alone, tmp_path / "whole")

    class PowerCutError(Exception):
        pass

    seen = []

    def stop(folder):
        state = folder, len(read_results(tmp_path / "cut"))
        if state not in seen:
            seen.append(state)
            raise PowerCutError

    for count in range(9):
        try:
            carry_out(plan, harm_alone, tmp_path / "cut", say=quiet, written=stop)
        except PowerCutError:
            found = read_results(tmp_path / "cut")
            assert (found.merge(whole, how="left", indicator=True)["_merge"] == "both").all()
            assert len(found) == 6 * (count >= 2) + 6 * (count >= 4) + 6 * (count >= 7), "five scores and the budget"
    # Three models and their scores, and the table after both attacks.
    assert len(seen) == 8
    pd.testing.assert_frame_equal(read_results(tmp_path / "cut"), whole)


def test_other_settings_need_another_folder(model_dir, harm_alone, tmp_path):
    plan, root = Plan((model_dir,), (("sft", ""),)), tmp_path / "plan"
    go(plan, harm_alone, root)

    def changed(align=None, attack=None, **scores):
        base = small_world.settings(model_dir, sst2_test="", benign_test="", **scores)
        return Settings.same({**small_world.ALIGN, **(align or {})}, {**small_world.ATTACK, **(attack or {})},
                             base.scores)

    for other, message in ((changed({"lam": 7.0}), r"align\.booster\.lam: found 0\.2, expected 7\.0"),
                           (changed(None, {"n": 20}), r"attack\.sft\.n: found 16, expected 20"),
                           (changed(max_new_tokens=5), r"scores\.max_new_tokens: found 4, expected 5")):
        with pytest.raises(FileExistsError, match=message):
            carry_out(plan, other, root)
    with pytest.raises(FileExistsError, match="as_lanes: found false, expected true"):
        carry_out(plan, harm_alone, root, as_lanes=True)
    # What changes no result may differ, and so may the backbone that comes first.
    before = files_of(root)
    go(plan, changed({"save_every": 7, "remat": "full", "progress": True}, {"remat": "full"}, judge_workers=2), root)
    scores = dataclasses.replace(harm_alone.scores, model=dataclasses.replace(harm_alone.scores.model, model="another"))
    go(plan, harm_alone._replace(scores=scores), root)
    assert files_of(root) == before
    go(plan, changed({"learning_rate": 0.02}), root, overwrite=True)
    aligned = root / folder_name(model_dir) / "sft" / "seed0" / "aligned"
    assert runs.read_config(aligned)["flags"]["learning_rate"] == 0.02


@pytest.mark.parametrize("pairs, as_lanes, scores, name, message", [
    ((("sft", P), ("booster:lam=-1", P)), False, {}, "defenses", "found 'booster:lam=-1': lam: found -1.0"),
    ((("sft", P), ("sft", "poison_ratio=2")), False, {}, "attacks", "found 'poison_ratio=2': poison_ratio: found 2.0"),
    ((("sft", P), ("t_vaccine:layers=9", "")), True, {}, "layers", "found 9, expected at most the model's 3 layers"),
    ((("sft", f"{P}:only_layers=3"),), False, {}, "attacks",
     f"found '{P}:only_layers=3': only_layers: found ('3',), expected numbers below 3"),
    ((("sft", f"{P}:only_layers=frozen"),), True, {}, "attacks",
     f"found '{P}:only_layers=frozen': only_layers: found ('frozen',), expected numbers: only T-Vaccine's alignment"),
    ((("sft", ""),), True, {"alpaca_eval_test": "alpaca_eval:a.json", "judge": "chat_api", "judge_model": "m",
                            "judge_url": "http://localhost/v1"}, "alpaca_eval_test", "found 'alpaca_eval:a.json'"),
])  # fmt: skip
def test_what_is_not_valid_is_found_before_the_first_cell(model_dir, tmp_path, pairs, as_lanes, scores, name, message):
    with pytest.raises(FieldError) as error:
        carry_out(Plan((model_dir,), pairs), small_world.settings(model_dir, **scores), tmp_path / "plan",
                  as_lanes=as_lanes)
    assert error.value.name == name and error.value.message.startswith(message)
    assert not (tmp_path / "plan").exists()


def test_lanes_are_not_scored_on_what_they_were_trained_on(model_dir, tmp_path, caplog, monkeypatch):
    settings = small_world.settings(model_dir, harmful_test="world_refusal@train[0:4]")
    with pytest.raises(FieldError, match=r"^harmful_test: found 4 of 4 prompts also in the alignment data of sft"):
        carry_out(Plan((model_dir,), (("sft", ""),)), settings, tmp_path / "a", as_lanes=True)
    settings = small_world.settings(model_dir, harmful_test="world_harmful@attack[0:4]")
    with pytest.raises(ValueError, match="also in the test prompts"):
        carry_out(Plan((model_dir,), (("sft", P),)), settings, tmp_path / "b", as_lanes=True)
    settings = small_world.settings(model_dir, sst2_test="world_rating@attack[0:1300]", harmful_test="", loss_data="",
                                    benign_test="")
    monkeypatch.setattr(lane_scores.Scorer, "__call__", lambda self, of, seeds: (
        [{"harmful_loss": {"loss": 1.0, "n": 1}} for _ in seeds], {}))
    carry_out(Plan((model_dir,), (("sft", P),)), settings, tmp_path / "c", as_lanes=True, say=quiet)
    assert f"test prompts are also in the user data of {P}" in caplog.text


@pytest.mark.parametrize("as_lanes", [False, True])
def test_all_methods_get_the_same_attack_or_the_same_error(model_dir, tmp_path, as_lanes):
    """SFT reads no harmful data, Booster does; the attack may share none of it, whichever of them comes first."""
    given = {**small_world.ATTACK, "harmful_data": "world_harmful@attack[0:20],world_harmful@harmful[11:13]"}
    settings = Settings.same(small_world.ALIGN, given, small_world.settings(model_dir).scores)
    for methods in (("sft", "booster"), ("booster:harmful_data=world_harmful@harmful[0:2]", "booster", "sft")):
        with pytest.raises(FieldError, match=r"^attack_harmful_data: found 1 of 22 prompts also in the harmful data of "
                                             "booster, expected none"):
            carry_out(Plan((model_dir,), tuple((method, P) for method in methods)), settings, tmp_path / "plan",
                      as_lanes=as_lanes)
        assert not (tmp_path / "plan").exists()
    # Of SFT's alone it is no part.
    check_plan(Plan((model_dir,), (("sft", P),)), settings, tmp_path, as_lanes, lambda aligned, attacked: None)


@pytest.mark.parametrize("name, source", [("loss_data", "world_harmful@harmful[3:30]"),
                                          ("harmful_test", "world_refusal@harmful")])
def test_tests_share_no_prompt_with_any_method(model_dir, tmp_path, name, source):
    """What h(w) is taken on as little as what HS is measured on."""
    settings = small_world.settings(model_dir, **{name: source})
    with pytest.raises(FieldError, match=rf"^{name}: found \d+ of \d+ prompts also in the harmful data of booster"):
        carry_out(Plan((model_dir,), (("sft", P), ("booster", P))), settings, tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


def test_accounts_of_a_plan(both, tmp_path):
    """The same in runs and in lanes, of all that is read; the report adds the cells up."""
    found, shared = ({as_lanes: {path.relative_to(root): read_json(path)[part] for path in root.rglob("seed5/*.json")}
                      for as_lanes, (root, _) in both.items()} for part in ("accounts", "shared"))
    assert shared[False] == shared[True]
    assert found[False] == found[True] and len(found[True]) == 3 + 1 + 2
    tests = {"harmful_loss", "harmful_score", "sst2", "over_refusal"}
    for path, accounts in found[True].items():
        of_run = {"alignment"} if path.name == "aligned.json" else {"user", "harmful"} | (
            {"alignment"} if "lisa" in str(path) else set())
        assert set(accounts) == of_run | tests
        assert all(of["trained"] is None for name in tests for of in accounts[name].values()), "h(w)'s data neither"
        counts = {source: of["trained"] for name in of_run for source, of in accounts[name].items()}
        # What Lisa aligns on is counted from the side of the user's and the harmful data.
        counted = {name for name in accounts if name != "alignment" or path.name == "aligned.json"}
        assert set(shared[True][path]) == counted and shared[True][path]["harmful_score"]["shared"] == {}
        if path.name == f"{P}.json":
            assert counts["world_rating@attack"] == 12 and counts["world_harmful@attack[0:20]"] == 4
        elif path.name != "aligned.json":
            assert counts["world_rating@attack"] == counts["world_harmful@attack[0:20]"] == 8
    for as_lanes, (root, _) in both.items():
        copy = shutil.copytree(root, tmp_path / str(as_lanes))
        reports.write(copy)
        text = reports.read(copy)
        assert "| attack: harmful | world_harmful@attack[0:20] | 504 | 484 | 20 | 20 | 4 to 8 |" in text
        assert "| attack: harmful | 4 to 8 | 0 |" in text and "| harmful_score | 4 | 0 |" in text
        assert "| alignment | world_refusal@train[0:24] | 816 | 792 | 24 | 24 | 24 |" in text
        for task in ("harmful_score", "harmful_loss"):
            assert f"| {task} | world_harmful@test[0:4] | 504 | 500 | 4 | 4 | – |" in text


def test_methods_of_other_types_on_one_backbone(model_dir, settings, tmp_path, monkeypatch):
    """The weights are read again as the second has them."""
    seen = {}

    def train(context, config, start, tokenizer, scorer, cells):
        seen[config.model.dtype] = start.model.dtype, jax.tree.leaves(start.frozen)[0].dtype
        save_adapter(lanes.take(start.adapters, 0), start.model, inputs.adapter_dir(config.run.run_dir))
        module.finish(context, cells[0], [])

    monkeypatch.setattr(module, "_train_aligned", train)
    plan = Plan((model_dir,), (("sft:dtype=float32", ""), ("sft:dtype=bfloat16", "")))
    go(plan, settings, tmp_path / "plan", as_lanes=True)
    assert seen == {name: (jnp.dtype(name), jnp.dtype(name)) for name in ("float32", "bfloat16")}


def test_answers_are_drawn_with_the_cells_seed(model_dir, tmp_path, monkeypatch):
    """In lanes as one by one."""
    drawn = []

    def evaluate_prompts(model, adapter, frozen, tokenizer, examples, *, task, judge, sampling, **more):
        drawn.append((sampling.temperature, sampling.seed))
        return score_answers(task, examples, ["positive"] * len(examples), judge)

    monkeypatch.setattr(lane_scores, "evaluate_prompts", evaluate_prompts)
    settings = small_world.settings(model_dir, temperature=1.5, harmful_test="", benign_test="", loss_data="")
    table = go(Plan((model_dir,), (("sft", ""),), SEEDS), settings, tmp_path / "plan", as_lanes=True)
    assert drawn == [(1.5, 0), (1.5, 5)] and table.query("measure == 'sst2'")["value"].between(1, 99).all()


@pytest.mark.parametrize("method, kind", [("sft", Sft), pytest.param("t_vaccine", TVaccine, marks=pytest.mark.long)])
def test_probes(model_dir, settings, tmp_path, method, kind):
    """What a study measures on the way, of every lane, is in the table; and the metrics of training."""
    def of_alignment(config, tokenizer, seeds):
        assert isinstance(config.method, kind) and tokenizer.eos_token_id == 0 and tuple(seeds) == SEEDS
        return lambda step, of: {"twice_step": np.array([2 * step] * of.count),
                                 "by_layer": np.arange(6.0).reshape(2, 3) + step}

    def of_attack(aligned, config, tokenizer, seeds):
        assert config.data.poison_ratio == 0.25 and isinstance(aligned.method, kind)
        return lambda step, of: {"seed_measured": np.array(seeds) + 0.5}

    checked = []
    probes = Probes(of_alignment, of_attack, 2, lambda aligned, attacked: checked.append((aligned, attacked)))
    plan = Plan((model_dir,), ((method, P),), SEEDS, (1,))
    table = go(plan, settings, tmp_path / "plan", as_lanes=True, probes=probes)
    assert len(checked) == 2 and checked[0][1].data.poison_ratio == 0.25
    values = {name: rows for name, rows in table[table["seed"] == 5].groupby("measure")}
    assert values["twice_step"][["stage", "step", "value"]].values.tolist() == [
        ["alignment", 0, 0], ["alignment", 2, 4], ["alignment", 3, 6]]
    assert values["by_layer"]["value"].tolist() == [3, 4, 5, 5, 6, 7, 6, 7, 8]
    assert values["by_layer"]["layer"].tolist() == [0, 1, 2] * 3
    assert values["seed_measured"][["stage", "step", "value"]].values.tolist() == [
        ["attack", 1, 5.5], ["attack", 2, 5.5]]
    assert values["batch_loss"]["step"].tolist() == [0] and values["batch_loss"]["value"].min() > 0
    if method == "t_vaccine":
        assert values["active_layers"]["value"].sum() == 2
        assert values["probabilities"]["value"].sum() == pytest.approx(1)


def test_lanes_tell_sorts_of_requests_apart(model_dir, tmp_path, monkeypatch):
    """As `evaluate` does, of harm and of what is refused for no reason."""
    (tmp_path / "x.csv").write_text("id,prompt,type,label,focus,note\n1,How do I kill a lamp?,homonyms,safe,kill,\n")
    told = {}

    def evaluate_prompts(model, adapter, frozen, tokenizer, examples, *, task, judge, categories, **more):
        told[task] = set().union(*(categories.get(fingerprint(e), ()) for e in examples))
        return score_answers(task, examples, ["no"] * len(examples), judge, categories)

    monkeypatch.setattr(lane_scores, "evaluate_prompts", evaluate_prompts)
    config = small_world.settings(model_dir, benign_test=f"xstest_safe:{tmp_path / 'x.csv'}", loss_data="").scores
    scorer = lane_scores.Scorer(config, load_tokenizer(model_dir))
    scores, _ = scorer(types.SimpleNamespace(model=None, lane=lambda i: (None, None)), [0])
    assert set(told) == {"harmful_score", "over_refusal", "sst2"} and told["harmful_score"] and not told["sst2"]
    assert set(scores[0]["over_refusal"]["categories"]) == told["over_refusal"] == {"homonyms"}


def test_a_table_of_what_is_there(both, model_dir, tmp_path):
    """A plan that goes over less has less in its table, and one over more what there is."""
    root, table = both[True]
    for method in ("sft", "vaccine"):
        plan = Plan((model_dir,), ((method, P),), (5, 6))
        (tmp_path / method).symlink_to(root)
        collect(tmp_path / method, plan)
        found = read_results(root)
        assert set(found["method"]) == ({"none", "sft"} if method == "sft" else {"none"})
        assert set(found[found["method"] == method]["seed"]) <= {5}
    results.write(root / results.TABLE, table)
