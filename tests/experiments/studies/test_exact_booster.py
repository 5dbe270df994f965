"""Exact and approximate Booster at their smallest, and what is compared against numbers by hand."""

import pytest

from experiments.studies import exact_booster, regime
from experiments.studies.exact_booster import ExactBoosterConfig
from jaxvaccine.experiment.config import make
from jaxvaccine.report.results import pick, read_results
from tests.experiments import small
from tests.report import synthetic
from tests.report.synthetic import rows_of

pytestmark = pytest.mark.usefixtures("quick_compile")


def flags(model_dir, root, *more):
    return (f"--run_dir={root}", f"--model={model_dir}", *small.FLAGS, *small.ATTACK_FLAGS, "--score_steps=1",
            "--sst2_test=", "--benign_test=", "--measure_every=6", "--harmful_probe=world_harmful@harmful[0:4]",
            "--alignment_probe=world_refusal@train[0:3]", f"--attacks={regime.CONTINUED}1e-3", *more)


@pytest.mark.long
def test_end_to_end(model_dir, tmp_path):
    root = tmp_path / "a"
    small.call(exact_booster.VERB, *flags(model_dir, root, "--defenses=booster"))
    table, text = read_results(root), (root / "report.md").read_text()
    assert len(pick(table, measure="total_angle")) == 2 * 2 * 2  # both gradients, two seeds, before and after
    assert [row[0] for row in rows_of(text, "## The angle")[1:]] == ["Booster", "Booster (exact)"]
    assert rows_of(text)[1][:2] == ["Booster", "p = 0.1, same adapter, learning rate = 1e-3"]
    assert all((root / name).stat().st_size > 1000 for name in ("exact_booster.png", "exact_booster_angle.png"))
    assert "Missing so far" not in text


def test_what_is_compared():
    attack, methods = "poison_ratio=0.1:adapter=new", ("booster", "booster:alpha=0.03", "booster:alpha=0.3")
    config = make(ExactBoosterConfig, {"run_dir": "r", "attacks": (attack,)})
    rows = []
    for i, method in enumerate(methods):
        for name, more in ((method, 4 * i), (f"{method}:exact=true", 0)):
            for seed in (0, 1):
                place = {"method": name, "seed": seed}
                rows += [synthetic.rate("harmful_score", 0, **place),
                         synthetic.row("total_angle", 10.0 * (i + 1) + seed, **place)]
                rows += [synthetic.rate("harmful_score", value, attack=attack, stage="attack", step=step, **place)
                         for step, value in ((1, 20 + more), (2, 40 + more))]
    table = synthetic.frame(rows)
    found = [exact_booster.differences_by_run(table, method, attack) for method in methods]
    assert [of["angle"].tolist() for of in found] == [[10, 11], [20, 21], [30, 31]]
    # Of HS at steps 0, 1, 2 by the trapezoid rule: more · (1/2 + 1/2 + 1/2) / 2.
    assert [of["difference"].tolist() for of in found] == [[0, 0], [3, 3], [6, 6]]
    assert exact_booster.correlation_of(table, config, attack).mean == pytest.approx(1)
    lines = rows_of(exact_booster.place_table(table, config))[1:]
    assert [(line[5].split(" ±")[0], line[6]) for line in lines] == [
        ("+0.0", "0 above, 0 below, of 2"), ("+3.0", "0 above, 0 below, of 2"), ("+6.0", "0 above, 0 below, of 2")]


@pytest.mark.parametrize("flag, expected", [
    ("--defenses=booster:exact=true", "--defenses: found .*says? nothing of exact"), ("--defenses=sft", "--defenses: "),
    ("--measure_every=0", "--measure_every: found 0")])
def test_flags(model_dir, tmp_path, flag, expected):
    with pytest.raises(SystemExit, match=expected):
        small.call(exact_booster.VERB, *flags(model_dir, tmp_path / "a", flag))
