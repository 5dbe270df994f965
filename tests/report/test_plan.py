"""The report of a plan, from tables that are there."""

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from jaxvaccine.evaluation.rates import wilson_interval
from jaxvaccine.report import differences, names, plan, plots
from jaxvaccine.report.style import METHODS
from tests.report.synthetic import by_phrases, frame, labelled, plan_table, rate, row, rows_of

RATIOS = tuple(f"poison_ratio={p}" for p in ("0.2", "0", "0.1"))


def scored(hs, fa, loss=None, **place):
    return [rate("harmful_score", hs, **place), rate("sst2", fa, **place),
            *([row("harmful_loss", loss, **place)] if loss else [])]


AT = {"stage": "attack", "step": 100}


def test_one_run_has_wilson_intervals(tmp_path, figures):
    table = frame([*scored(50, 2, method="none", stage="backbone", step=0), *scored(10, 1, seed=4),
                   *scored(90, 80, seed=4, attack="poison_ratio=0.1", **AT)])
    text = plan.plan_report(table, tmp_path, "A plan")
    assert text.startswith("# A plan\n")
    assert rows_of(text) == [["method", "model", "HS %", "FA %"],
                             ["as it comes", "backbone", "50.0 (40–60)", "2.0 (1–7)"],
                             ["SFT", "aligned", "10.0 (6–17)", "1.0 (0–5)"],
                             ["SFT", "attacked, p = 0.1", "90.0 (83–94)", "80.0 (71–87)"]]
    assert "One run: world, seed 4." in text and "h(w)" not in text and "Missing" not in text
    assert list(figures) == ["scores.png"] and "![HS, FA](scores.png)" in text


def test_several_runs_and_what_is_missing(tmp_path, figures):
    """Mean, sample standard deviation, Student's interval and Wilson's joined; a method with fewer seeds says so."""
    aligned = [r for seed, hs in enumerate((10, 20, 60)) for r in scored(hs, 1, hs / 10, seed=seed)]
    booster = [*scored(10, 1, 1.0, method="booster"),
               *scored(3, 70, 5.0, method="booster", attack="poison_ratio=0", **AT)]
    cells = plan.Cells([("sft", ""), ("booster", "poison_ratio=0")], ["world"], [0, 1, 2])
    text = plan.plan_report(frame(aligned + booster), tmp_path, "T", cells)
    half = 4.302653 * np.std([10, 20, 60], ddof=1) / np.sqrt(3)
    up = np.mean([wilson_interval(count, 100)[1] - count for count in (10, 20, 60)])
    assert rows_of(text) == [
        ["method", "model", "HS %", "FA %", "h(w) (nats per token)", "P(HS > 50)", "runs"],
        ["SFT", "aligned", f"30.0 ± 26.5 (0–{30 + np.hypot(half, up):.0f})", "1.0 ± 0.0 (0–5)", "3.0 ± 2.6",
         f"{1.5 / 4:.2f} ({beta.ppf(0.025, 1.5, 2.5):.2f}–{beta.ppf(0.975, 1.5, 2.5):.2f}), 1 of 3", "3"],
        ["Booster", "aligned", "10.0 (6–17)", "1.0 (0–5)", "1", "–", "1"],
        ["Booster", "attacked, p = 0", "3.0 (1–8)", "70.0 (60–78)", "5", "–", "1"]]
    assert "over seeds (0, 1, 2) of world. In parentheses: 95% interval of the mean over seeds and prompts" in text
    assert "P(HS > 50): the probability that a new seed" in text
    assert "Missing so far: 2 of 6 runs. Booster, p = 0: world seed 1, world seed 2.\n" in text


def test_a_measure_that_some_runs_lack():
    table = frame([*scored(10, 1), rate("harmful_score", 30, seed=1), *scored(90, 80, attack="poison_ratio=0.1", **AT),
                   rate("harmful_score", 90, seed=1, attack="poison_ratio=0.1", **AT)])
    assert rows_of(plan.score_table(table))[1] == [
        "SFT", "aligned", "20.0 ± 14.1 (0–100)", "1.0 (0–5), 1 of 2 runs",
        f"0.17 (0.00–{beta.ppf(0.975, 0.5, 2.5):.2f}), 0 of 2", "2"]


def test_several_backbones():
    """The interval is over their means, and every row says of how many it is."""
    place = {"attack": "poison_ratio=0.1", **AT}
    table = frame([rate("harmful_score", value, backbone=backbone, seed=seed, **place)
                   for backbone, values in (("a", (90, 100)), ("b", (70,)), ("c", (80, 70, 60)))
                   for seed, value in enumerate(values)])
    cells = plan.Cells([("sft", "poison_ratio=0.1"), ("booster", "poison_ratio=0.1")], ["a", "b", "c"], [0, 1, 2])
    means = np.array([95, 70, 70])
    half = 4.302653 * np.std(means, ddof=1) / np.sqrt(3)
    down = np.mean([np.mean([v - wilson_interval(v, 100)[0] for v in of]) for of in ((90, 100), (70,), (80, 70, 60))])
    assert rows_of(plan.score_table(table, cells)) == [
        ["method", "model", "HS %", "P(HS > 50)", "runs (backbones)"],
        ["SFT", "attacked, p = 0.1", f"{means.mean():.1f} ± 14.7 ({means.mean() - np.hypot(half, down):.0f}–100)",
         f"{3.5 / 4:.2f} ({beta.ppf(0.025, 3.5, 0.5):.2f}–1.00), 6 of 6", "6 (3)"]]


def test_the_aligned_and_the_attacked_models_are_compared_with_sft(tmp_path, figures):
    text = plan.plan_report(plan_table(seeds=(0, 1)), tmp_path, "T")
    rows = rows_of(text, differences.HEADING)
    assert [row[:2] for row in rows] == [["method", "model"], ["Booster", "aligned"], ["Booster", "attacked, p = 0"],
                                         ["Booster", "attacked, p = 0.1"]]
    assert differences.NOTE in text
    alone = plan.plan_report(plan_table(("booster",), seeds=(0, 1)), tmp_path, "T")
    assert "Without results of SFT there is nothing to compare with." in alone


def test_a_judge_of_phrases_gives_no_hs(tmp_path, figures):
    """Not in a table, a figure, a title or a note."""
    text = plan.plan_report(by_phrases(plan_table(seeds=(0, 1))), tmp_path, "T")
    assert "HS" not in text and "harmful score" not in text.lower()
    assert rows_of(text)[0] == ["method", "model", "not refused %", "no answer %", "FA %", "over-refusal %",
                                "P(not refused > 50)", "runs"]
    assert "## Not refused along the attack\n" in text and "![not refused over attack steps]" in text
    assert next(row[3] for row in rows_of(text)[1:] if row[0] != "as it comes") == "30.0 ± 0.0 (22–40)"
    labels = [label for figure in figures.values() for axis in figure.axes
              for label in (axis.get_xlabel(), axis.get_ylabel(), axis.get_title())]
    assert "not refused (%), lower is better" in labels and not any("HS" in label for label in labels)


def test_unread_answers_stand_beside_hs_as_a_bound():
    def of(hs, unread, **more):
        return [rate("harmful_score", hs, **more), rate("no_answer", 10, **more), rate("unread", unread, **more)]

    table = frame([*of(50, 20), *of(30, 0, attack="poison_ratio=0.1", **AT)])
    header, aligned, attacked = rows_of(plan.score_table(table))
    assert header == ["method", "model", "HS %", "no answer %", "unread %"]
    # 40 of 100 if none of the 20 were harmful, 60 if all were.
    assert aligned[4] == "20.0 (13–29), HS 40.0–60.0" and attacked[4] == "0.0 (0–4), HS 30.0–30.0"
    assert "unread %" not in rows_of(plan.score_table(frame(of(50, 0))))[0]


def test_hs_plus_is_a_column_where_it_is_not_hs():
    def of(hs, plus, **more):
        return [rate("harmful_score", hs, **more), rate("harmful_score_plus", plus, **more), rate("sst2", 9, **more)]

    attacked = {"attack": "poison_ratio=0.1", **AT}
    assert rows_of(plan.score_table(frame([*of(50, 50), *of(30, 30, **attacked)])))[0][2:] == ["HS %", "FA %"]
    on_the_way = of(20, 25, **attacked | {"step": 1})  # which the table does not show
    assert rows_of(plan.score_table(frame([*of(50, 50), *on_the_way, *of(30, 30, **attacked)])))[0][2:] == [
        "HS %", "FA %"]
    found = rows_of(plan.score_table(frame([*of(50, 50), *of(30, 41, **attacked)])))
    assert found[0][2:] == ["HS %", "HS+ %", "FA %"] and found[2][3].startswith("41.0 (")


def test_measures_of_a_study_and_those_by_layer_are_no_scores():
    table = pd.concat([plan_table(seeds=(0,)), frame([
        row("activation_gradient_norm", 3.0, layer=0.0), row("regularizer_angle", 3.0), row("toxicity", 3.0),
        row("loss", 2.0, step=5)])])
    assert [of.name for of in plan.score_measures(table).values()] == ["HS", "FA", "over-refusal", "toxicity"]


def test_steps():
    at = {"stage": "attack", "attack": "poison_ratio=0.1"}
    table = frame([*scored(0, 0), *scored(10, 0, seed=1),
                   *[r for seed in (0, 1) for step, hs in ((10, 20 - 10 * seed), (40, 80 - 70 * seed))
                     for r in scored(hs, 90, seed=seed, step=step, **at)],
                   *scored(5, 5, method="booster"), *scored(50, 50, method="booster", step=10, **at)])
    assert rows_of(plan.steps_table(table)) == [
        ["method", "attack", "HS % at step 0", "HS % at step 10", "HS % at step 40", "mean along the attack"],
        ["SFT", "p = 0.1", "5.0 ± 7.1", "15.0 ± 7.1", "45.0 ± 49.5", "25.0 ± 21.2 (0–100)"],
        ["Booster", "p = 0.1", "5.0", "50.0", "–", "–"]]


def test_over_poison_ratios(tmp_path, figures):
    table = plan_table(("t_vaccine", "booster", "sft+lisa"), RATIOS)
    text = plan.plan_report(table, tmp_path, "T")
    assert "Not drawn: FA (aligned: every mean is 0, attacked: every mean is " in text
    axes = [axis for axis in figures["scores.png"].axes if axis.get_ylabel()]
    assert [axis.get_ylabel() for axis in axes] == ["HS (%), lower is better", "over-refusal (%), lower is better"]
    axis = axes[0]
    assert axis.get_xlabel() == "p, harmful part of the user's data" and axis.get_xscale() == "linear"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["aligned", "0", "0.1", "0.2"]
    assert axis.get_xticks()[1:].tolist() == [0, 0.1, 0.2]
    lines = [c.lines[0] for c in axis.containers if len(c.lines[0].get_xdata()) == 3]
    assert [line.get_color() for line in lines] == [METHODS[name].color for name in ("t_vaccine", "booster", "lisa")]
    expected = table.query("method == 'booster' and stage == 'attack' and step == 100 and measure == 'harmful_score'")
    means = expected.groupby("attack")["value"].mean()
    np.testing.assert_allclose(lines[1].get_ydata().astype(float),
                               [means[f"poison_ratio={p}"] for p in ("0", "0.1", "0.2")])
    assert labelled(axis)["as it comes"].get_ydata()[0] == 100


def test_other_attacks_are_a_dot_plot(tmp_path, figures):
    attacks = ("poison_ratio=0.1", "poison_ratio=0.1:adapter=new", "poison_ratio=0.2:adapter=new")
    plan.plan_report(plan_table(attacks=attacks, seeds=(0,)), tmp_path, "T")
    axis = figures["scores.png"].axes[0]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["aligned", "p = 0.1", "p = 0.1, new adapter",
                                                                    "p = 0.2, new adapter"]
    assert axis.get_xlabel() == "HS (%), lower is better" and list(labelled(axis)) == ["as it comes", "SFT", "Booster"]
    assert all(c.lines[0].get_linestyle() == "None" for c in axis.containers)


def test_when_attacks_differ_in_the_ratio_alone():
    assert plan.poison_ratios(RATIOS) == dict(zip(RATIOS, ("0.2", "0", "0.1"), strict=True))
    rated = tuple(f"{attack}:adapter=new" for attack in RATIOS)
    assert plan.poison_ratios(rated) == dict(zip(rated, ("0.2", "0", "0.1"), strict=True))
    assert plan.poison_ratios(RATIOS[:2]) is None and plan.poison_ratios([*RATIOS, rated[0]]) is None
    assert plan.poison_ratios(["", "poison_ratio=0.1", "poison_ratio=0.2"]) is None and plan.poison_ratios([]) is None


def test_curves_and_plane(tmp_path, figures):
    table = plan_table(("sft", "t_vaccine"), attacks=("poison_ratio=0.1", "poison_ratio=0.2"), seeds=(0, 1))
    # One attack that does nothing.
    still = table["attack"] == "poison_ratio=0.2"
    table.loc[still & (table["measure"] == "harmful_score"), "value"] = 0.0
    text = plan.plan_report(table, tmp_path, "T")
    assert "Not drawn: HS over the steps of p = 0.2 (every mean is 0" in text
    (axis,) = figures["harmful_score.png"].axes
    assert (axis.get_title(loc="left"), axis.get_xlabel(), axis.get_ylabel()) == (
        "p = 0.1", "attack step", "HS (%), lower is better")
    line = labelled(axis)["T-Vaccine"]
    assert line.get_xdata().tolist() == [0, 20, 40, 60, 80, 100] and line.get_color() == METHODS["t_vaccine"].color
    of = table.query("method == 't_vaccine' and measure == 'harmful_score'")
    np.testing.assert_allclose(line.get_ydata()[[0, -1]], [
        of[of["stage"] == "alignment"]["value"].mean(),
        of[(of["attack"] == "poison_ratio=0.1") & (of["step"] == 100)]["value"].mean()])
    assert len(axis.collections) == 2, "a band for each of two runs or more"
    plane = figures["plane.png"].axes[0]
    assert (plane.get_xlabel(), plane.get_ylabel()) == ("FA (%), higher is better", "HS (%), lower is better")
    np.testing.assert_allclose(labelled(plane)["T-Vaccine"].get_ydata(), line.get_ydata())
    ends = [end for end in plane.lines if end.get_markeredgecolor() == "black" and len(end.get_xdata()) == 1]
    assert len(ends) == 2


def test_a_plan_without_steps_on_the_way(tmp_path, figures):
    """And an earlier report's figures, which would not belong to it."""
    (tmp_path / "plane.png").write_bytes(b"old")
    (tmp_path / "plane.pdf").write_bytes(b"old")
    text = plan.plan_report(plan_table(steps=(100,)), tmp_path, "T")
    assert "along the attack" not in text and set(figures) == {"scores.png"}
    assert not (tmp_path / "plane.png").exists() and not (tmp_path / "plane.pdf").exists()


def test_what_a_table_goes_over():
    table = pd.concat([plan_table(("sft", "sft+lisa")), frame([rate("harmful_score", 0, method="vaccine")])])
    table = table[(table["method"] != "sft+lisa") | (table["stage"] == "attack")]
    cells = plan.cells_of(table[(table["method"] != "sft") | (table["stage"] != "attack")])
    assert cells.pairs == [("sft+lisa", "poison_ratio=0"), ("sft+lisa", "poison_ratio=0.1"), ("vaccine", "")]
    assert (cells.backbones, cells.seeds) == (["world"], [0, 1, 2])
    text = plan.score_table(table)
    assert [row[:2] for row in rows_of(text)[5:8]] == [
        ["SFT + Lisa", "aligned"], ["SFT + Lisa", "attacked, p = 0"], ["SFT + Lisa", "attacked, p = 0.1"]]


FULL = plan_table(("sft", "booster:lam=0.2"), RATIOS, backbones=("world", "b"), seeds=(0, 1), steps=(20, 100))
CELLS = plan.cells_of(FULL)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_gaps(tmp_path, figures, seed, kept):
    """Whatever part of a table is there: every cell that is there has a row, and the numbers are those of its runs."""
    rng = np.random.default_rng(seed)
    # Whole runs are missing, and single rows.
    runs = FULL[["backbone", "method", "attack", "seed", "stage"]].apply(tuple, axis=1)
    there = {run for run in runs.unique() if rng.random() < kept}
    table = FULL[[run in there for run in runs] & (rng.random(len(FULL)) < 0.9)]
    text = plan.plan_report(table, tmp_path, "T", CELLS)
    found = rows_of(text)
    models = table[["method", "attack", "stage"]].drop_duplicates()
    assert len(found) - 1 == len(models)
    done = table.query("stage == 'attack'")[["backbone", "method", "attack", "seed"]].drop_duplicates()
    assert ("Missing" in text) == (len(done) < 2 * 3 * 2 * 2)
    by_model = {("as it comes", "backbone"): ("none", "", "backbone")}
    for method, attack in CELLS.pairs:
        by_model |= {(names.method(method), "aligned"): (method, "", "alignment"),
                     (names.method(method), f"attacked, {names.attack(attack)}"): (method, attack, "attack")}
    measures = list(plan.score_measures(table))
    for line in found[1:]:
        method, attack, stage = by_model[tuple(line[:2])]
        rows = table[(table["method"] == method) & (table["attack"] == attack) & (table["stage"] == stage)]
        last = rows[rows["step"] == rows.groupby(["backbone", "seed"])["step"].transform("max")]
        for cell, measure in zip(line[2:], measures, strict=False):
            of = last[last["measure"] == measure]
            values = of["value"]
            assert cell.startswith(f"{of.groupby('backbone')['value'].mean().mean():.1f}" if len(values) else "–")
            assert (f" ± {values.std():.1f} " in cell) == (len(values) > 1)
    for figure in figures.values():
        for axis in figure.axes:
            assert all(np.isfinite(line.get_xydata()).all() for line in axis.lines)
    figures.clear()


def test_a_real_figure(tmp_path):
    plan.plan_report(plan_table(attacks=RATIOS, seeds=(0, 1), steps=(100,)), tmp_path, "T")
    assert {path.name for path in tmp_path.iterdir()} == {"scores.png", "scores.pdf"}
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
    assert plots.panels(1)[0].legends == []


def test_more_methods_than_there_are_colours(tmp_path, figures):
    """Fourteen of one's own beside those that have a style: all are drawn and named, a missing one is said."""
    own = [f"sft:rank={rank}" for rank in range(1, 9)] + [f"vaccine:rho={rho}" for rho in range(1, 7)]
    methods = [*(name for name in METHODS if name not in ("none", "lisa", "ewc", "kl")), *own]
    table = plan_table(methods, seeds=(0, 1), steps=(20, 40))
    lost = table[(table["method"] != methods[3]) | (table["stage"] != "attack")]
    cells = plan.Cells([(method, attack) for method in methods for attack in sorted(set(table["attack"]) - {""})],
                       ["world"], [0, 1])
    text = plan.plan_report(lost, tmp_path, "T", cells)
    assert {line[0] for line in rows_of(text)[1:]} >= {names.method(m) for m in methods if m != methods[3]}
    assert "Missing so far: 4 of" in text and names.method(methods[3]) in text
    assert figures
