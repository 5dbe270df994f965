"""Plans: the texts of methods and attacks as settings, the folders of cells, and the papers' grids."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvaccine import data
from jaxvaccine.experiment import methods, plans, recipes
from jaxvaccine.experiment.config import FieldError, change, flat, make
from jaxvaccine.experiment.evaluate_config import EvaluateConfig
from jaxvaccine.experiment.plans import GRIDS, METHODS, Panel, Plan, Point, Settings, cell_configs
from jaxvaccine.experiment.results import Cell

SCORES = make(EvaluateConfig, recipes.WORLD_TESTS, {"model": "m", "run_dir": "-", "progress": False})
WORLD = Settings.same(recipes.WORLD_ALIGN, recipes.WORLD_ATTACK, SCORES)
ROOT = Path("r")


def configs(method, attack="", settings=WORLD, seed=0, backbone="world"):
    return cell_configs(settings, ROOT, Cell(backbone, method, attack, seed))


def test_variants():
    """A text is what differs from the settings."""
    found, none = configs("booster:lam=0.5:steps=7:targets=q_proj+o_proj:base_defense=vaccine")
    assert none is None
    assert found.method == methods.Booster(lam=0.5, base=methods.Vaccine(rho=recipes.WORLD_ALIGN["rho"]))
    assert (found.training.steps, found.adapter.targets) == (7, ("q_proj", "o_proj"))
    expected = configs("booster")[0]
    assert change(found, lam=0.2, steps=150, targets=recipes.ALL, base_defense="sft",
                  run_dir=expected.run.run_dir) == expected
    _, attacked = configs("sft", "rank=4:adapter=new")
    assert (attacked.adapter.rank, attacked.adapter.adapter) == (4, "new")
    assert attacked.training.learning_rate == recipes.WORLD_ATTACK["learning_rate"]
    found, _ = configs("booster:harmful_data=world_harmful@harmful[0:20]:alpha=0.3")
    assert (found.data.harmful_data, found.method.alpha) == ("world_harmful@harmful[0:20]", 0.3)
    # + is the comma between sources.
    _, attacked = configs("sft", "poison_ratio=0.1:user_data=world_rating@attack+world_rating@more:n=700")
    assert attacked.data.user_data == "world_rating@attack,world_rating@more" and attacked.data.n == 700
    _, attacked = configs("sft", "poison_ratio=0.1:only_layers=0+2")
    assert attacked.adapter.only_layers == ("0", "2")


@pytest.mark.parametrize("method, message", [
    ("booster:lamb=1", "lamb: found '1', expected no such field"), ("sft:steps=1.5", "steps: found '1.5'"),
    ("sft:steps", "defense: found 'sft:steps', expected one of sft"), ("adam", "expected one of sft"),
    ("t_vaccine:freeze=never", "freeze: found 'never', expected one of layer"), ("lam=1", "expected a defense first"),
    ("sft:lam=1", "lam: found 1.0, expected nothing: defense=sft does not read it"),
    ("booster:lam=-1", "lam: found -1.0"), ("sft:progress=false", "progress: .*the plan sets it"),
    ("sft:seed=1", "seed: found '1', expected nothing: the plan sets it"), ("sft:run_dir=x", "the plan sets it"),
    ("sft:batch_size=0", "batch_size: found 0, expected at least 1"), ("sft+lisa:rho=1", "rho: found '1', expected no"),
    ("", "expected a defense first"), ("sft+adam", "expected one of sft"),
    # What stages have in common, of which a plan's scores and tokenizers have one.
    ("sft:system_prompt=x", "system_prompt: .*the plan sets it"), ("sft:supervise=last", "the plan sets it"),
    ("sft:revision=x", "the plan sets it"), ("sft+lisa:supervise=last", "the plan sets it"),
])  # fmt: skip
def test_methods_that_are_none(method, message):
    with pytest.raises(FieldError, match=f"^defenses: found '.*{message}"):
        configs(method, "poison_ratio=0.1")


@pytest.mark.parametrize("attack, message", [
    ("new", "new: found '', expected no such field"), ("poison_ratio=2", "poison_ratio: found 2.0, expected 0 <="),
    ("poison_ratio=0.1:rho=2", "rho: found '2', expected no such field"), ("adapter=old", "expected one of auto"),
    ("poison_ratio=0.1:lisa_rho=2", "lisa_rho: found 2.0, expected nothing: defense=none does not read it"),
    ("test_data=x", "the plan sets it"), ("aligned=x", "the plan sets it"), ("only_layers=a", "numbers of at least 0"),
    ("poison_ratio=0.1:rank=4", "rank: found 4, expected 8, as the continued adapter was aligned"),
    ("poison_ratio=0.1:learning_rate=nan", "learning_rate"), ("n=0", "n: found 0, expected at least 1"),
])  # fmt: skip
def test_attacks_that_are_none(attack, message):
    with pytest.raises(FieldError, match=f"^attacks: found '{attack}': .*{message}"):
        configs("sft", attack)


@pytest.mark.parametrize("align, attack, name, message", [
    ({"batch_size": 0}, {}, "batch_size", "found 0, expected at least 1"),
    ({}, {"batch_size": 0}, "attack_batch_size", "found 0, expected at least 1"),
    ({"harmful_data": ""}, {}, "harmful_data", "found '', expected a data source, which booster needs"),
    ({}, {"user_data": ""}, "attack_user_data", "found '', expected a data source, unless --poison_ratio=1"),
    ({}, {"rank": 4}, "attack_rank", "found 4, expected 8, as the continued adapter was aligned, or --adapter=new"),
    ({"alignment_data": "nothing"}, {}, "alignment_data", "data source nothing: found kind"),
])
def test_errors_of_what_all_cells_start_from_name_the_flag(align, attack, name, message):
    settings = Settings.same({**recipes.WORLD_ALIGN, **align}, {**recipes.WORLD_ATTACK, **attack}, SCORES)
    with pytest.raises(FieldError) as error:
        configs("booster", "poison_ratio=0.1", settings)
    assert error.value.name == name and error.value.message.startswith(message)


def test_folders():
    """<backbone>/<method>/seed<k>/aligned and beside it the attack's; methods share the alignment that they share."""
    aligned, attacked = configs("booster:lam=0.5", "poison_ratio=0.1:adapter=new", seed=3, backbone="org/model")
    folder = "r/org_model/booster_lam=0.5/seed3"
    assert aligned.run.run_dir == attacked.model.aligned == f"{folder}/aligned"
    assert attacked.run.run_dir == f"{folder}/poison_ratio=0.1_adapter=new"
    assert aligned.run.seed == attacked.run.seed == 3 and aligned.model.model == "org/model"
    for text in ("sft+lisa", "sft+lisa:lisa_rho=0.5"):
        aligned, attacked = configs(text, "poison_ratio=0.1")
        assert aligned == configs("sft")[0] and aligned.run.run_dir == "r/world/sft/seed0/aligned"
        name = text.replace(":", "_")
        assert attacked.run.run_dir == f"r/world/{name}/seed0/poison_ratio=0.1"
    assert attacked.method == methods.Lisa(2, 18, 0.5)
    assert attacked.data.alignment_data == aligned.data.alignment_data == recipes.WORLD_ALIGN["alignment_data"]
    assert configs("sft", "poison_ratio=0.1")[1].data.alignment_data == ""
    # The defense may stand in the attack as well.
    _, other = configs("sft", "poison_ratio=0.1:defense=lisa:lisa_rho=0.5")
    assert change(other, run_dir=attacked.run.run_dir) == attacked


@pytest.mark.parametrize("text, expected", [
    ("sft", ("sft", "")), ("sft+lisa", ("sft", "lisa")),
    ("booster:lam=2+ewc:ewc_lam=1", ("booster:lam=2", "ewc:ewc_lam=1")),
    ("sft:targets=q_proj+k_proj", ("sft:targets=q_proj+k_proj", "")),
    ("sft:targets=q_proj+k_proj+kl:kl_lam=1", ("sft:targets=q_proj+k_proj", "kl:kl_lam=1")),
    ("sft+lisacle", ("sft+lisacle", "")),
])  # fmt: skip
def test_split_method(text, expected):
    assert plans.split_method(text) == expected


def test_the_attack_starts_from_the_alignment():
    """Type, recomputation and padding are the aligned model's; the tests' prompts are kept out of the attack."""
    settings = Settings.same({**recipes.WORLD_ALIGN, "dtype": "bfloat16", "remat": "dots", "bucket": 8,
                              "save_every": 7}, recipes.WORLD_ATTACK, SCORES)
    _, attacked = configs("sft", "poison_ratio=0.1", settings)
    assert (attacked.model.dtype, attacked.model.remat, attacked.data.bucket, attacked.run.save_every) == (
        "bfloat16", "dots", 8, 7)
    assert attacked.data.test_data == SCORES.tests.harmful_test
    assert attacked.run.progress is False and attacked.run.overwrite is False


def test_settings_by_defense():
    settings = Settings({name: recipes.WORLD_ALIGN | {"rank": rank} for name, rank in (("sft", 2), ("booster", 3))},
                        {name: recipes.WORLD_ATTACK | {"n": n} for name, n in (("sft", 20), ("booster", 30))}, SCORES)
    for text, rank, n in (("sft", 2, 20), ("booster:lam=1", 3, 30), ("sft+kl", 2, 20), ("sft:rank=5", 5, 20)):
        aligned, attacked = configs(text, "poison_ratio=0.1", settings)
        assert (aligned.adapter.rank, attacked.data.n) == (rank, n)


def test_plan():
    plan = Plan.product(("a", "b"), ("sft", "booster"), ("p=0", "p=1"), (3,), (1, 2))
    pairs = (("sft", "p=0"), ("sft", "p=1"), ("booster", "p=0"), ("booster", "p=1"))
    assert plan == Plan(("a", "b"), pairs, (3,), (1, 2))
    assert plan.methods == ("sft", "booster") and plan.attacks == ("p=0", "p=1")
    alone = Plan(("a",), (("sft", ""), ("booster", "p=1"), ("sft", "p=0")))
    assert alone.of_method("sft") == ("p=0",) and alone.methods == ("sft", "booster") and alone.seeds == (0,)


@pytest.mark.parametrize("given, message", [
    ((("a",), (), (0,)), "pairs: found"), (((), (("sft", ""),), (0,)), "backbones: found"),
    ((("a",), (("sft", ""),), ()), "seeds: found"), ((("a",), (("sft", ""),), (1, 1)), "seeds: found .* each once"),
    ((("a",), (("sft", ""), ("sft", "")), (1,)), "pairs: found .* each once"),
])
def test_plans_that_are_none(given, message):
    with pytest.raises(FieldError, match=f"^{message}"):
        Plan(*given)
    for methods_, attacks, name in (((), ("p=0",), "defenses"), (("sft",), (), "attacks")):
        with pytest.raises(FieldError, match=f"^{name}: found"):
            Plan.product(("a",), methods_, attacks, (0,))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), max_size=12))
def test_pairs_are_each_once_those_of_a_method_together(points):
    curves = {str(i): [Point("0", *point)] for i, point in enumerate(points)}
    found = plans.pairs([Panel("", "", curves), Panel("", "", dict(list(curves.items())[:3]))])
    assert set(found) == set(points) and len(found) == len(set(found))
    order = [method for method, _ in found]
    assert order == sorted(order, key=[method for method, _ in points].index)
    for method in set(order):
        mine = [attack for name, attack in points if name == method]
        assert [attack for name, attack in found if name == method] == list(dict.fromkeys(mine))


@pytest.mark.parametrize("name", GRIDS)
def test_every_cell_is_a_valid_setting(name):
    panels = GRIDS[name].panels(METHODS)
    found = plans.pairs(panels)
    assert len(found) == len(set(found)) and GRIDS[name].title
    order = [method for method, _ in found]
    assert order == sorted(order, key=order.index), "the cells of a method are not together"
    settings = set()
    for method, attack in found:
        aligned, attacked = configs(method, attack)
        part = attacked.data
        data.poison(data.load_examples(part.user_data), data.load_examples(part.harmful_data), part.n,
                    part.poison_ratio, 0)  # raises if there is not enough of either
        adapter = attacked.adapter.resolve(flat(aligned), attacked.method)
        settings.add((change(aligned, run_dir="-"), change(attacked, run_dir="-", aligned="-"), adapter))
    assert len(settings) == len(found), "the same setting has several names"
    for panel in panels:
        assert panel.title and panel.curves and all(panel.curves.values())
        for curve in panel.curves.values():
            places = [point.x for point in curve]
            assert len(places) == len(set(places)), panel


def test_points_stand_where_their_settings_are():
    """The number on the x axis is the one that the cell's config has."""
    checked = 0
    for name, field in (("ratios", "poison_ratio"), ("samples", "n")):
        for panel in GRIDS[name].panels(METHODS):
            assert list(panel.curves) == list(METHODS)
            for method, curve in panel.curves.items():
                for point in curve:
                    assert point.method == method and flat(configs(*point[1:])[1])[field] == float(point.x)
                    checked += 1
    for panel in GRIDS["sensitivity"].panels(METHODS):
        for curve in panel.curves.values():
            for point in curve:
                if panel.xlabel in flat(configs(point.method)[0]):
                    assert flat(configs(point.method)[0])[panel.xlabel] == float(point.x), (panel.title, point)
                    checked += 1
    assert checked == 2 * 4 * 5 + 10 + 4 + 3 + 3 + 5 + 4 + 6 + 4


def test_attacks_of_every_size_last_as_many_epochs():
    usual = recipes.WORLD_ATTACK
    for curve in GRIDS["samples"].panels(METHODS)[0].curves.values():
        epochs = {flat(configs(*point[1:])[1])["epochs"] for point in curve}
        assert epochs == {usual["steps"] * usual["batch_size"] / usual["n"]}


def test_a_default_is_not_written_and_so_shares_other_panels_cells():
    panel = plans.over("title", "lam", ("0.1", "0.2"), ("booster", "sft"), {"lam": 0.2})
    assert panel == Panel("title", "lam", {
        name: [Point("0.1", f"{name}:lam=0.1"), Point("0.2", name)] for name in ("booster", "sft")})
