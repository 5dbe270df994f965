"""Settings per task at their smallest, and regrets against numbers by hand."""

import numpy as np
import pytest

from experiments.studies import per_task
from experiments.studies.per_task import PerTaskConfig, chosen, regrets
from jaxvaccine.experiment.config import make
from jaxvaccine.report.results import pick, read_results
from tests.experiments import small
from tests.report import synthetic
from tests.report.synthetic import rows_of

pytestmark = pytest.mark.usefixtures("quick_compile")


def flags(model_dir, root, *more):
    return (f"--run_dir={root}", f"--model={model_dir}", *small.FLAGS, *small.ATTACK_FLAGS, "--score_steps=1",
            "--benign_test=", "--lams=0.2", "--alphas=0.1,0.3", *more)


@pytest.mark.long
def test_end_to_end(model_dir, tmp_path):
    root = tmp_path / "a"
    tasks = ("world_negation", "world_contrast")
    small.call(per_task.VERB, *flags(
        model_dir, root, f"--tasks={','.join(f'{task}@attack' for task in tasks)}",
        f"--task_tests={','.join(f'{task}@test[0:4]' for task in tasks)}"))
    for task in tasks:
        table = read_results(root / f"{task}_attack")
        assert set(table["method"]) == {"sft", "booster:lam=0.2:alpha=0.1", "booster:lam=0.2:alpha=0.3"}
        assert set(pick(table, stage="attack", measure="sst2")["n"]) == {4}
    text = (root / "report.md").read_text()
    assert [row[0] for row in rows_of(text, "The common setting")[1:]] == ["world negation", "world contrast"]
    assert "world_contrast@test[0:4]" in text and "Missing so far" not in text
    assert (root / "per_task.png").stat().st_size > 1000


def test_what_is_chosen():
    """Two tasks, three settings, two runs."""
    hs = np.array([[[10, 20], [30, 40], [20, 20]], [[50, 60], [10, 20], [20, 20]]], float)
    assert chosen(hs) == (2, [0, 1])
    fa = np.array([[[90, 90], [80, 80], [85, 95]], [[70, 70], [99, 99], [60, 80]]], float)
    found = regrets(hs, fa, [("world", 0), ("world", 1)])
    # The second run alone has the third setting for both tasks, the first alone the second; of equals the first one.
    without_first, without_second = chosen(hs[:, :, 1:]), chosen(hs[:, :, :1])
    assert without_first == (2, [0, 1]) and without_second == (1, [0, 1])
    assert found[0].hs.values.tolist() == [20 - 10, 40 - 20] and found[1].hs.values.tolist() == [20 - 10, 0]
    assert found[0].fa.values.tolist() == [90 - 85, 90 - 80] and found[1].fa.values.tolist() == [99 - 60, 0]
    assert regrets(hs[:, :, :1], fa[:, :, :1], [("world", 0)]) == []


def test_the_report(tmp_path):
    config = make(PerTaskConfig, {"run_dir": "r", "lams": ("0.2",), "alphas": ("0.1", "0.3"), "seeds": ("0", "1"),
                                  "tasks": ("world_rating@attack", "world_contrast@attack"), "task_tests": ("a", "b")})
    ends = ({"0.1": 40, "0.3": 60}, {"0.1": 80, "0.3": 20})
    found = []
    for of_task in ends:
        rows = []
        for seed, method, end in ((seed, method, end) for seed in (0, 1) for method, end in (
                ("sft", 90), *((f"booster:lam=0.2:alpha={alpha}", end) for alpha, end in of_task.items()))):
            place = {"method": method, "seed": seed}
            at = {**place, "attack": "poison_ratio=0.1", "stage": "attack"}
            rows += [synthetic.rate("harmful_score", 0, **place),
                     *(synthetic.rate("harmful_score", end, step=step, **at) for step in (1, 2)),
                     *(synthetic.rate("sst2", end, step=step, **at) for step in (1, 2))]
        found.append(synthetic.frame(rows))
    text = per_task.report(config, found, tmp_path)
    lines = rows_of(text, "The common setting, of all runs: Booster (lam = 0.2, alpha = 0.3)")[1:]
    assert [line[:6] for line in lines] == [
        ["world rating", "Booster (lam = 0.2, alpha = 0.1)", "30.0", "45.0", "40.0", "60.0"],
        ["world contrast", "Booster (lam = 0.2, alpha = 0.3)", "15.0", "15.0", "20.0", "20.0"]]
    assert [line[6].split(" ±")[0] for line in lines] == ["+15.0", "+0.0"]
    assert [line[7].split(" ±")[0] for line in lines] == ["-20.0", "+0.0"]
    assert (tmp_path / "per_task.png").stat().st_size > 1000 and "Missing so far" not in text


@pytest.mark.parametrize("flag, expected", [
    ("--task_tests=a", "--task_tests: found"), ("--defenses=sft", "--defenses: found .*expected Boosters"),
    ("--lams=", "--lams: found"), ("--attacks=poison_ratio=0,poison_ratio=0.1", "--attacks: found")])
def test_flags(model_dir, tmp_path, flag, expected):
    with pytest.raises(SystemExit, match=expected):
        small.call(per_task.VERB, *flags(model_dir, tmp_path / "a", flag))
