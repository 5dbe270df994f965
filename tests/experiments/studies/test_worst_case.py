"""The search of attacks, end to end at its smallest."""

import json

import pytest

from experiments.studies import worst_case
from experiments.studies.worst_case import Given, WorstCaseConfig, groups
from jaxvaccine.experiment.config import make
from jaxvaccine.experiment.plans import attack_values
from jaxvaccine.experiment.search import check, read_trials
from tests.experiments import small
from tests.report.synthetic import rows_of


@pytest.fixture(scope="module")
def model_dir(world_model):
    return world_model()


def flags(model_dir, root, **more):
    given = {"run_dir": root, "model": model_dir, "seeds": "1", "defenses": "sft,sft+kl", "trials": "3", "top": "1",
             "score_steps": "1", "tune_trials": "1", **more}
    tests = [f"--{name}={value}" for name, value in small.TESTS.items()]
    own = [flag for flag in small.FLAGS if "--seeds" not in flag and "harmful_test" not in flag]
    return (*own, *small.ATTACK_FLAGS, *tests, *(f"--{name}={value}" for name, value in given.items()))


@pytest.fixture(scope="module")
def sorts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sorts") / "sorts.json"
    path.write_text(json.dumps({"learning rate": {"learning_rate": {"from": 1e-4, "to": 1e-2}}}))
    return path


@pytest.mark.long
def test_end_to_end(model_dir, tmp_path, capsys, sorts_file):
    root = tmp_path / "search"
    small.call(worst_case.VERB, *flags(model_dir, root, sorts_file=sorts_file))
    text = (root / "report.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    methods = [row[0] for row in rows_of(text)[1:]]
    # One other setting of each was tried, and stands beside it where it is the better one.
    assert [name for name in methods if "=" not in name] == ["SFT", "SFT + KL"] and len(methods) <= 4
    for method in ("sft", "sft+kl"):
        tried = read_trials(root, method)
        assert len(tried) == 3 and all(1e-4 <= attack_values(of.attack)["learning_rate"] <= 1e-2 for of in tried)
        assert len(json.loads((root / "tuning" / f"{method}.json").read_text())) == 2
    assert all((root / name).is_file() for name in ("results.csv", "worst_case.png", "worst_case_plane.png"))
    # The same again changes nothing; other settings are another search.
    before = (root / "results.csv").read_bytes()
    small.call(worst_case.VERB, *flags(model_dir, root, sorts_file=sorts_file))
    assert (root / "results.csv").read_bytes() == before
    with pytest.raises(SystemExit, match="holds a run with other flags"):
        small.call(worst_case.VERB, *flags(model_dir, root, sorts_file=sorts_file, loss="0.2"))


def test_methods_that_share_an_alignment_are_one_process_s():
    assert groups(["sft", "booster", "sft+kl", "booster:lam=1", "sft+lisa"]) == [
        ["sft", "sft+kl", "sft+lisa"], ["booster"], ["booster:lam=1"]]


def test_every_sort_is_an_attack_on_some_method(world_model, tmp_path):
    """All texts and the ends of all ranges, on the methods that the study has by default."""
    config = make(WorstCaseConfig, {"run_dir": str(tmp_path), "model": (world_model(6),), "recipe": "world"})
    refused = check(worst_case.search_of(Given(config, {}, {}, small.TESTS)), config.methods)
    assert set(refused) == set(config.methods)
    names = [sort.name for sort in config.chosen_sorts({})]
    assert len(names) == len(set(names)) and not any("," in name for name in names)  # they are items of a flag
    # What trains by the provider's own program.
    assert not set(refused["sft+lisa"]) & {"learning rate", "adapter"}
