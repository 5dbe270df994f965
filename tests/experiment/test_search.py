"""The search: budget, rounds, what is refused, what came to no end, going on. Results are made up in a plan's files."""

import json
import sys

import pytest

from jaxvaccine.experiment import search as module
from jaxvaccine.experiment import tuning
from jaxvaccine.experiment.config import FieldError, change
from jaxvaccine.experiment.plan_folder import result_path
from jaxvaccine.experiment.plans import Settings, attack_values, split_method
from jaxvaccine.experiment.results import Cell
from jaxvaccine.experiment.search import (
    BENIGN,
    USUAL,
    Search,
    SearchPart,
    cell_rows,
    check,
    collect,
    harmful_rows,
    plan_root,
    read_refused,
    read_trials,
    search_method,
    strongest_attacks,
)
from jaxvaccine.experiment.spaces import Range, Sort
from jaxvaccine.report.results import read_results
from tests.experiment import small_world

RATES = Sort("rates", ({"learning_rate": Range(1e-5, 1e-3)},))
LAYERS = Sort("layers", ({"only_layers": ("0", "1"), "learning_rate": ("2e-4",)},))
FIRST = Sort("first", ({"only_layers": ("2",), "rank": ("2",)},), of=("t_vaccine",))
STEPS = (1, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_world.world_model(tmp_path_factory.mktemp("model"))


def make_search(model, root, trials=7, sorts=(RATES, LAYERS), **more):
    return Search(SearchPart(**{"trials": trials, "top": 2, **more}), sorts, (model, "other"), (1, 2), STEPS,
                  Settings.same(small_world.ALIGN, {**small_world.ATTACK, "n": 20}, small_world.settings(model).scores),
                  root, True, lambda line: None)


def harm_of(text):
    """In percent: best at a learning rate of 1e-4, nothing without harmful rows."""
    values = attack_values(text)
    if values.get("poison_ratio") == 0:
        return 0.0
    return max(0.0, 90 - abs(values.get("learning_rate", 2e-4) - 1e-4) * 1e5) - 20 * ("only_layers" in values)


@pytest.fixture
def plans(monkeypatch):
    """The plans that are carried out, each by made-up results; a learning rate above 9e-4 diverges."""
    done = []

    def carry_out(plan, settings, root, *, as_lanes, say):
        done.append(plan)
        for method, text in plan.pairs:
            for backbone in plan.backbones:
                for seed in plan.seeds:
                    for attack in ("", text):
                        cell = Cell(backbone, method, attack, seed)
                        path = result_path(root, cell)
                        if path.exists():
                            continue
                        if attack_values(attack).get("learning_rate", 0) > 9e-4:
                            raise FloatingPointError("loss: found nan")
                        path.parent.mkdir(parents=True, exist_ok=True)
                        stage, steps = ("attack", STEPS) if attack else ("alignment", (3,))
                        path.write_text(json.dumps({"rows": [
                            {**cell._asdict(), "stage": stage, "step": step, "measure": measure, "value": value,
                             "n": 100, "low": value, "high": value} for step in steps for measure, value in
                            (("harmful_score", harm_of(attack) * step / STEPS[-1] if attack else 0.0),
                             ("sst2", 90.0 if attack else 0.0), ("over_refusal", 0.0))]}))

    monkeypatch.setattr(module, "carry_out", carry_out)
    return done


def test_a_budget_over_all_sorts(model, tmp_path, plans):
    search = make_search(model, tmp_path)
    search_method(search, "sft", {})
    trials = read_trials(tmp_path, "sft")
    # The small space has two points; what it leaves goes to the other.
    assert [of.sort for of in trials].count("layers") == 2 and len(trials) == 7
    assert len({of.attack for of in trials}) == 7
    best = sorted((of.attack for of in trials if not of.failed), key=lambda text: -harm_of(text))[:2]
    assert strongest_attacks(search, "sft") == best
    # Those alone are run on all backbones and seeds, with what they are compared with.
    assert plans[-1].backbones == (model, "other") and plans[-1].seeds == (1, 2)
    assert plans[-1].attacks == (BENIGN, USUAL, *best)
    assert all(plan.backbones == (model,) and plan.seeds == (0,) for plan in plans[:-1])
    collect(search, ["sft"])
    found = read_results(tmp_path)
    assert set(found["attack"]) == {"", BENIGN, USUAL, *(of.attack for of in trials if not of.failed)}
    assert set(found[found["attack"].isin(best)]["seed"]) == {0, 1, 2}


def test_of_equally_strong_ones_the_fastest(model, tmp_path, plans, monkeypatch):
    search = make_search(model, tmp_path)
    search_method(search, "sft", {})
    monkeypatch.setattr(module, "_worth", lambda search, method, trial: 100.0)
    tried = [of.attack for of in read_trials(tmp_path, "sft") if not of.failed]
    # The made-up HS grows with the steps alike for all.
    assert strongest_attacks(search, "sft") == sorted(tried, key=harm_of, reverse=True)[:2]


def test_it_goes_on_and_grows(model, tmp_path, plans):
    search_method(make_search(model, tmp_path / "cut", trials=3), "sft", {})
    search_method(make_search(model, tmp_path / "cut", trials=9), "sft", {})
    search_method(make_search(model, tmp_path / "whole", trials=9), "sft", {})
    # Whoever stopped at 3 ended a round early; the trials before are the same ones.
    cut, whole = (read_trials(tmp_path / name, "sft") for name in ("cut", "whole"))
    assert cut[:3] == whole[:3] and len(cut) == len(whole) == 9
    count = len(plans)
    search_method(make_search(model, tmp_path / "whole", trials=9), "sft", {})
    assert read_trials(tmp_path / "whole", "sft") == whole
    assert all(cell_rows(make_search(model, tmp_path / "whole"), Cell(model, "sft", text, 0))
               for plan in plans[count:] for text in plan.attacks)


def test_a_round_that_was_cut_off_is_carried_out(model, tmp_path, plans):
    search = make_search(model, tmp_path, trials=4)
    search_method(search, "sft", {})
    trials = read_trials(tmp_path, "sft")
    path = result_path(plan_root(search, "sft"), Cell(model, "sft", trials[-1].attack, 0))
    path.unlink()
    search_method(search, "sft", {})
    assert path.exists() and read_trials(tmp_path, "sft") == trials


def test_what_diverges_is_a_trial_without_a_result(model, tmp_path, plans):
    search = make_search(model, tmp_path, trials=12, sorts=(Sort("high", ({"learning_rate": Range(8e-4, 1e-3)},)),))
    search_method(search, "sft", {})
    trials = read_trials(tmp_path, "sft")
    rates = {of.attack: attack_values(of.attack)["learning_rate"] for of in trials}
    assert {of.attack for of in trials if of.failed} == {text for text, rate in rates.items() if rate > 9e-4}
    assert 0 < sum(bool(of.failed) for of in trials) < len(trials) == 12
    assert "nan" in next(of.failed for of in trials if of.failed)


def test_what_is_no_attack_on_a_method(model, tmp_path):
    search = make_search(model, tmp_path, sorts=(RATES, FIRST))
    refused = check(search, ["sft", "t_vaccine"])
    assert refused == {"sft": {"first": "an attack on t_vaccine"}, "t_vaccine": {}}
    # Without such a method it has no place, and is no mistake.
    assert check(search, ["sft"]) == {"sft": refused["sft"]}
    with pytest.raises(FieldError, match="defenses: found 'sft', expected a method that can be attacked"):
        check(make_search(model, tmp_path, sorts=(FIRST,)), ["sft"])
    with pytest.raises(FieldError, match=r"^sorts: found 'none', expected a sort of attack on some .*numbers below 3"):
        check(make_search(model, tmp_path, sorts=(Sort("none", ({"only_layers": ("7",)},)),)), ["sft"])
    with pytest.raises(FieldError, match=r"search_seeds: .*none of --seeds"):
        check(make_search(model, tmp_path, search_seeds=("1",)), ["sft"])
    search = make_search(model, tmp_path)
    scores = change(search.settings.scores, harmful_test="", benign_test="world_benign@test[0:4]")
    with pytest.raises(FieldError, match=r"^harmful_test: found '', expected harmful prompts"):
        check(search._replace(settings=search.settings._replace(scores=scores)), ["sft"])
    with pytest.raises(FieldError, match="sampler: found 'best', expected one of random, tpe"):
        SearchPart(sampler="best")


def test_the_estimator_needs_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(FieldError, match=r"sampler: found 'tpe', expected random: .*jaxvaccine\[search\]"):
        SearchPart(sampler="tpe")


def test_refused_sorts_are_recorded_and_not_tried(model, tmp_path, plans):
    search = make_search(model, tmp_path, trials=3, sorts=(RATES, FIRST))
    search_method(search, "sft", {"first": "why"})
    assert {of.sort for of in read_trials(tmp_path, "sft")} == {"rates"}
    assert read_refused(tmp_path, "sft") == {"first": "why"}


def test_harmful_rows():
    config = small_world.attack_config("aligned", "run", poison_ratio=0.25, batch_size=4)
    assert [harmful_rows(config, step) for step in (0, 1, 8)] == [0, 1, 8]
    # In all 20 steps of 4 rows, 20 are harmful.
    config = change(config, steps=20)
    first, last = (change(config, order=order) for order in ("harmful_first", "harmful_last"))
    assert [harmful_rows(first, step) for step in (0, 1, 5, 20)] == [0, 4, 20, 20]
    assert [harmful_rows(last, step) for step in (0, 15, 16, 20)] == [0, 0, 4, 20]
    # An objective's own batch comes on top, as long as there is one.
    steepened = change(config, objective="steepen", steepen_steps=3, objective_batch_size=2)
    assert [harmful_rows(steepened, step) for step in (0, 1, 3, 20)] == [0, 3, 9, 26]


def test_tuning_takes_the_setting_with_the_least_harm(model, tmp_path, plans, monkeypatch):
    search = make_search(model, tmp_path)
    start = float(tuning.space_of(search, "vaccine").spaces[0]["rho"].low * tuning.FACTOR)
    assert start == small_world.ALIGN["rho"]
    monkeypatch.setattr(tuning, "along", lambda search, cell: [made_up(cell)])

    def made_up(cell):
        rho = float(split_method(cell.method)[0].partition("rho=")[2] or start)
        # The larger the better, but beyond twice the start the aligned model refuses everything.
        use = {"sst2": 90.0, "over_refusal": 10.0 if rho > 2 * start else 100.0}
        return module.Scored(1, 100 / rho if cell.attack else 0.0, use)

    best = tuning.tune(search, "vaccine", 12)
    tried = [float(text.partition("rho=")[2]) for text in json.loads(
        (tmp_path / tuning.FOLDER / "vaccine.json").read_text()) if "=" in text]
    assert len(tried) == 12
    assert float(best.partition("rho=")[2]) == max(rho for rho in tried if rho <= 2 * start) > start
    # Nothing is carried out twice, and the answer is the same.
    count = len(plans)
    assert tuning.tune(search, "vaccine", 12) == best and len(plans) == count + 1
    # Of the provider's, what it does while fine-tuning.
    (space,) = tuning.space_of(search, "sft+lisa").spaces
    assert set(space) == {"lisa_rho"}
