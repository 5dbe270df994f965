"""A whole experiment's config: which plan it is, what its cells start from, and what it refuses."""

import json
from pathlib import Path

import pytest

from jaxvaccine import data
from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.config import FieldError, make
from jaxvaccine.experiment.methods import ALIGNMENT
from jaxvaccine.experiment.plans import METHODS, cell_configs
from jaxvaccine.experiment.results import Cell
from jaxvaccine.experiment.run import PlanConfig, check_given, make_settings, run
from jaxvaccine.json_files import read_json
from jaxvaccine.report.results import read_results
from tests.experiment import small_world

TESTS = {"harmful_test": "world_harmful@test[0:4]"}


def config_of(**given):
    return make(PlanConfig, {"run_dir": "r", **given})


@pytest.mark.parametrize("given, message", [
    *(({"defenses": names}, "defenses: found .*expected all, or some of sft, ") for names in (
        ("sft", "prayer"), ("sft", "all"), ("lisa",), ("sft+sft",), ("all+lisa",), ("sft+prayer",))),
    ({"defenses": ()}, "defenses: found .*expected at least one"),
    ({"defenses": ("sft", "sft")}, "defenses: found .*expected each once"),
    ({"poison_ratios": ("0.1", "2")}, "poison_ratios: found .*expected numbers from 0 to 1"),
    ({"poison_ratios": ("some",)}, "poison_ratios: found .*expected numbers from 0 to 1"),
    ({"poison_ratios": ("nan",)}, "poison_ratios: found .*expected numbers from 0 to 1"),
    ({"seeds": ()}, "seeds: found .*expected numbers of at least 0"),
    ({"seeds": ("0", "-1")}, "seeds: found .*expected numbers of at least 0"),
    ({"seeds": ("a",)}, "seeds: found .*expected numbers of at least 0"),
    ({"seeds": ("1", "1")}, "seeds: found .*expected each once"),
    ({"seeds": ("1", "01")}, "seeds: found .*expected each once"),
    ({"score_steps": ("x",)}, "score_steps: found .*expected numbers of at least 0"),
    ({"attacks": ("p=1", "p=1")}, "attacks: found .*expected each once"),
    ({"model": ()}, "model: found .*expected at least one"), ({"run_dir": ""}, "run_dir: found ''"),
    ({"model": ("a", "a")}, "model: found .*expected each once"),
    ({"plan": "all"}, "plan: found 'all', expected one of"),
])  # fmt: skip
def test_what_is_refused(given, message):
    with pytest.raises(FieldError, match=f"^{message}"):
        config_of(**given).make_plan()


def test_the_plan():
    plan = config_of(model=("a", "b"), defenses=("sft", "booster:lam=0.2"), seeds=("0", "7"), score_steps=("3",)
                     ).make_plan()
    assert plan.backbones == ("a", "b") and plan.seeds == (0, 7) and plan.score_steps == (3,)
    assert plan.pairs == tuple((method, attack) for method in ("sft", "booster:lam=0.2")
                               for attack in ("poison_ratio=0", "poison_ratio=0.1"))
    attacks = ("poison_ratio=0.1:adapter=new", "")
    assert config_of(defenses=("sft",), attacks=attacks).make_plan().pairs == tuple(("sft", text) for text in attacks)
    grid = config_of(plan="ratios")
    assert grid.make_plan().methods == METHODS and len(grid.make_plan().pairs) == 20
    assert [panel.xlabel for panel in grid.panels()] == ["p"] and not config_of().panels()
    assert config_of(plan="ratios", defenses=("sft", "tar")).make_plan().methods == ("sft", "tar")


def test_all_defenses_on_the_small_world():
    """Every method of both stages, in the world's settings, which values that are given go before."""
    config = config_of(defenses=("all",), seeds=("0", "2"))
    align, attack = {"steps": 7}, {"lisa_rho": 3.0, "kl_lam": 0.5}
    plan, settings = config.make_plan(), make_settings(config, align, attack, {})
    check_given(plan, settings, align, attack)
    assert set(plan.methods) == {*ALIGNMENT, "sft+lisa", "sft+ewc", "sft+kl"} and plan.seeds == (0, 2)
    scores = settings.scores
    assert scores.tests.harmful_test == recipes.WORLD_TESTS["harmful_test"] and scores.tests.max_length == 16
    assert scores.model.model == "world"
    cells = {}
    for name, text in plan.pairs:
        for seed in plan.seeds:
            aligned, attacked = cells[name, text, seed] = cell_configs(
                settings, Path("r"), Cell("world", name, text, seed))
            first, _, tuning = name.partition("+")
            assert aligned.training.steps == 7 and type(aligned.method) is ALIGNMENT[first]
            assert aligned.run.run_dir == f"r/world/{first}/seed{seed}/aligned"
            assert attacked.run.run_dir == f"r/world/{name}/seed{seed}/{text}"
            assert attacked.model.aligned == aligned.run.run_dir
            assert attacked.data.poison_ratio == float(text.removeprefix("poison_ratio="))
            assert attacked.run.seed == aligned.run.seed == seed
            assert type(attacked.method).__name__.lower() == (tuning or "undefended")
            assert attacked.data.test_data == scores.tests.harmful_test
    booster = cells["booster", "poison_ratio=0", 0][0].method
    assert (booster.lam, booster.alpha) == (recipes.WORLD_ALIGN["lam"], recipes.WORLD_ALIGN["alpha"])
    aligned, attacked = cells["sft+lisa", "poison_ratio=0", 2]
    assert aligned == cells["sft", "poison_ratio=0", 2][0]
    assert attacked.data.alignment_data == recipes.WORLD_ALIGN["alignment_data"] and attacked.method.rho == 3.0
    assert cells["sft+kl", "poison_ratio=0", 2][1].method.lam == 0.5


def test_recipes():
    """The world's for the world, none for others, and a paper's where it is asked for, on the world too."""
    def first(settings, name="vaccine"):
        return settings.align[name].get("rank"), settings.attack[name].get("n")

    assert first(make_settings(config_of(), {}, {}, {})) == (8, 500)
    assert first(make_settings(config_of(recipe="none", model=("world",)), {}, {}, TESTS)) == (None, None)
    assert first(make_settings(config_of(model=("m",)), {}, {}, TESTS)) == (None, None)
    assert first(make_settings(config_of(model=("m",), recipe="world"), {}, {}, {})) == (8, 500)
    published = config_of(recipe="t_vaccine", defenses=("sft", "vaccine", "t_vaccine"))
    settings = make_settings(published, {}, {"n": 30}, TESTS)
    assert first(settings) == (8, 30)
    assert first(make_settings(config_of(recipe="booster", defenses=("sft",)), {}, {"n": 30}, TESTS)) == (32, 30)
    # The small world's data is no paper's.
    with pytest.raises(FieldError, match=r"^alignment_data: found '', expected a data source"):
        check_given(published.make_plan(), settings, {}, {})
    with pytest.raises(FieldError, match=r"^harmful_test: found '', expected at least one of"):
        make_settings(published, {}, {}, {})
    # The tests' length is the alignment's unless given.
    assert make_settings(published, {"max_length": 77, "dtype": "bfloat16"}, {}, TESTS).scores.tests.max_length == 77


@pytest.mark.parametrize("align, attack, message", [
    ({"lam": 1.0}, {}, "lam: found 1.0, expected nothing: no method of the plan reads it"),
    ({"rho": 1.0, "inner_steps": 3}, {}, "inner_steps: found 3, expected nothing"),
    ({}, {"ewc_lam": 1.0}, "attack_ewc_lam: found 1.0, expected nothing: no method of the plan reads it"),
    ({}, {"batch_size": 0}, "attack_batch_size: found 0, expected at least 1"),
    ({"nonsense": 1}, {}, "nonsense: found 1, expected nothing"),
])
def test_values_that_no_method_of_the_plan_reads(align, attack, message, tmp_path):
    config = config_of(run_dir=str(tmp_path / "r"), defenses=("sft+lisa", "vaccine"))
    with pytest.raises(FieldError, match=f"^{message}"):
        run(config, align, attack, {})
    assert not (tmp_path / "r").exists()
    # One of several that reads it is enough.
    check_given(config.make_plan(), make_settings(config, {"rho": 1.0}, {"lisa_rho": 2.0}, {}), {"rho": 1.0},
                {"lisa_rho": 2.0})


@pytest.mark.parametrize("scores, message", [
    ({"harmful_test": "nonsense@test"}, "harmful_test: data source"), ({"top_p": 7.0}, "top_p"),
    ({"harm_test": "x"}, "harm_test: found 'x', expected no such field"),
    ({"judge": "nobody"}, "judge: found 'nobody'"),
])
def test_values_that_the_evaluation_refuses(scores, message):
    with pytest.raises(ValueError, match=message):
        make_settings(config_of(), {}, {}, scores)


@pytest.mark.long
@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("lanes", [False, True])
def test_the_prompt_and_the_rows_reach_every_stage(model_dir, tmp_path, lanes):
    """What is said of the alignment holds for the attack and the tests too, both ways of carrying out a plan."""
    sources = {}
    for name, source in (("alignment", "world_refusal@train[0:20]"), ("user", "world_rating@attack[0:20]")):
        rows = [{"instruction": e.instruction, "output": e.output} for e in data.load_examples(source)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows + rows[:5])))
        sources[name] = f"instructions:{tmp_path / name}.jsonl"

    def carried_out(name, **given):
        config = config_of(run_dir=str(tmp_path / name), model=(model_dir,), recipe="world", defenses=("sft",),
                           poison_ratios=("0.25",), lanes=lanes, score_base=False, progress=False)
        tests = {key: value for key, value in small_world.SCORES.items() if key not in ("max_length", "progress")}
        run(config, {"alignment_data": sources["alignment"], "steps": 3, "batch_size": 4, **given},
            {"user_data": sources["user"], "n": 16, "steps": 2, "batch_size": 4}, tests)
        table = read_results(tmp_path / name)
        accounts = {part: of for stage in ("aligned", "poison_ratio=0.25")
                    for path in (tmp_path / name).rglob(f"{stage}.json")
                    for part, of in read_json(path)["accounts"].items()}
        return table[table["measure"] == "harmful_loss"].set_index("stage")["value"], [
            (of["duplicates"], of["examples"]) for part in sources for of in accounts[part].values()]

    (usual, distinct), (plain, rows) = carried_out("usual"), carried_out(
        "plain", prompt="plain", data_protocol="rows")
    assert len(usual) == 2 and (abs(plain / usual - 1) > 1e-5).all(), "rounding is a tenth of that"
    assert distinct == [(5, 20), (5, 20)] and rows == [(0, 25), (0, 25)]
