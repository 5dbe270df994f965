"""Panels: their tables, lines over numbers and dot plots of names; and the attacker who chooses."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxvaccine.experiment.plans import Panel, Point
from jaxvaccine.report import differences, panels
from jaxvaccine.report.style import METHODS
from tests.report.synthetic import by_phrases, frame, labelled, plan_table, rate, rows_of

P = "poison_ratio=0.1"


def over(name, values, methods, default):
    return Panel(f"Setting {name}", name, {method: [
        Point(value, method if value == default else f"{method}:{name}={value}", P) for value in values]
        for method in methods})


ABLATION = Panel("Parts", "", {"t_vaccine": [
    Point("T-Vaccine", "t_vaccine", P), Point("the most probable layers", "t_vaccine:draw=top", P),
    Point("no perturbation", "t_vaccine:rho=0", P)]})


def table_of(*of, attacks=(P,), **changes):
    methods = dict.fromkeys(point.method for panel in of for curve in panel.curves.values() for point in curve)
    return plan_table(list(methods), attacks, with_backbone=False, **changes)


def test_scores_of_a_point():
    at = {"stage": "attack", "attack": P}
    table = frame([
        *(rate(measure, value, seed=seed) for seed, hs in enumerate((0, 10)) for measure, value in (
            ("harmful_score", hs), ("sst2", 1), ("over_refusal", 4))),
        rate("harmful_score", 99, seed=7),  # aligned and not attacked
        *(rate(measure, value, seed=seed, step=step, **at) for seed, (early, late) in enumerate(((20, 80), (10, 10)))
          for step, hs, fa in ((10, early, 2), (40, late, 3))
          for measure, value in (("harmful_score", hs), ("sst2", fa))),
    ])
    found = panels.read_scores(table)["sft", P]
    # (10 · (0 + 20) / 2 + 30 · (20 + 80) / 2) / 40
    assert (found.chance.count, found.chance.runs, found.chance.mean) == (1, 2, 0.5)
    for each, expected in zip(found[:-1], ([0, 10], [80, 10], [40, 10], None, None, [3, 3], [4, 4]), strict=True):
        if expected is None:
            assert each is None
        else:
            np.testing.assert_allclose(each.values, expected)


def test_lines_over_a_number(tmp_path, figures):
    panel = over("rho", ("15", "0.5", "5.0", "50"), ("vaccine", "t_vaccine"), "5.0")
    table = table_of(panel)
    text = panels.panel_report(table, tmp_path, panel, 3)
    assert text.startswith("## Setting rho\n") and "![Setting rho](panel3.png)" in text
    rows = rows_of(text)
    assert rows[0] == ["method", "rho", "HS % aligned", "HS % attacked", "HS % along the attack", "FA % attacked",
                       "over-refusal % aligned", "P(HS > 50) attacked"]
    assert [row[:2] for row in rows[1:]] == [[name, x] for name in ("Vaccine", "T-Vaccine")
                                             for x in ("15", "0.5", "5.0", "50")]
    values = table.query("method == 't_vaccine' and step == 100 and measure == 'harmful_score'")["value"]
    assert rows[7][3].startswith(f"{values.mean():.1f} ± {values.std():.1f} (")
    axes = figures["panel3.png"].axes
    assert axes[0].get_xscale() == "log" and axes[0].get_xlabel() == "rho"
    assert axes[-1].get_ylabel() == "HS along the attack (%),\nlower is better"
    line = labelled(axes[-1])["T-Vaccine"].lines[0]
    assert line.get_xdata().tolist() == [0.5, 5, 15, 50] and line.get_color() == METHODS["t_vaccine"].color
    scores = panels.read_scores(table)
    np.testing.assert_allclose(line.get_ydata().astype(float), [scores[f"t_vaccine{more}", P].along.mean for more in (
        ":rho=0.5", "", ":rho=15", ":rho=50")])


def test_what_a_judge_of_phrases_measured_is_called_so(tmp_path, figures):
    """In every heading, label and note; what is no answer, and what is unread, has columns beside it."""
    panel = over("lam", ("0", "0.1", "0.2"), ("booster", "sft"), "0.2")
    table = by_phrases(table_of(panel), unread=5)
    text = panels.panels_report(table, tmp_path, "T", [panel], ["world"], [0, 1])
    assert rows_of(text)[0] == ["method", "lam", "not refused % aligned", "not refused % attacked",
                                "not refused % along the attack", "no answer % attacked", "unread % attacked",
                                "FA % attacked", "over-refusal % aligned", "P(not refused > 50) attacked"]
    labels = [axis.get_ylabel() for axis in figures["panel0.png"].axes]
    assert any("not refused" in label for label in labels) and not any("HS" in label for label in labels)
    assert "HS" not in text and "Not refused: answers" in text and "Unread: " in text
    assert "unread" not in panels.panels_report(by_phrases(table_of(panel)), tmp_path, "T", [panel], ["world"], [0, 1])


def test_names_are_a_dot_plot(tmp_path, figures):
    text = panels.panel_report(table_of(ABLATION), tmp_path, ABLATION, 0)
    assert [row[0] for row in rows_of(text)] == ["variant", *(point.x for point in ABLATION.curves["t_vaccine"])]
    assert "Not drawn: HS attacked (every mean is " in text and "FA attacked (every mean is " in text
    (axis,) = figures["panel0.png"].axes
    assert axis.get_xlabel() == "HS along the attack (%), lower is better"
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [
        "T-Vaccine", "the most probable layers", "no perturbation"]
    assert all(c.lines[0].get_linestyle() == "None" for c in axis.containers)
    # An x axis that has a name but no numbers.
    named = Panel("Projections", "projections", {method: [Point("q, k", f"{method}:targets=q_proj+k_proj", P),
                                                          Point("all", method, P)] for method in ("sft", "vaccine")})
    rows = rows_of(panels.panel_report(table_of(named), tmp_path, named, 1))
    assert rows[0][:2] == ["method", "projections"] and rows[1][:2] == ["SFT", "q, k"]
    assert figures["panel1.png"].axes[0].get_yticklabels()[0].get_text() == "q, k"


def test_learning_rates_are_logarithmic(tmp_path, figures):
    panel = Panel("Learning rate", "learning rate", {"sft": [Point(rate, "sft", f"{P}:learning_rate={rate}")
                                                             for rate in ("0.0001", "0.0002", "0.0005")]})
    table = table_of(panel, attacks=tuple(point.attack for point in panel.curves["sft"]))
    panels.panel_report(table, tmp_path, panel, 0)
    axis = figures["panel0.png"].axes[-1]
    assert axis.get_xscale() == "log" and [t.get_text() for t in axis.get_xticklabels()] == ["0.0001", "0.0002",
                                                                                             "0.0005"]


def test_a_report_of_panels_compares_its_points_with_sft(tmp_path, figures):
    """Those on the same attack; SFT itself is no line."""
    panel = over("lam", ("0", "0.1", "0.2"), ("booster", "sft"), "0.2")
    text = panels.panels_report(table_of(panel), tmp_path, "T", [panel], ["world"], [0, 1, 2])
    rows = rows_of(text, differences.HEADING)
    assert {row[0] for row in rows[1:]} == {"Booster", "Booster (lam = 0)", "Booster (lam = 0.1)", "SFT (lam = 0)",
                                            "SFT (lam = 0.1)"}
    assert {row[-1] for row in rows[1:]} == {"3"} and "left out" not in text
    text = panels.panels_report(table_of(ABLATION), tmp_path, "T", [ABLATION], ["world"], [0, 1, 2])
    assert "Without results of SFT there is nothing to compare with." in text


def test_a_report_of_panels(tmp_path, figures):
    text = panels.panels_report(table_of(ABLATION, seeds=(0,), steps=(100,)), tmp_path, "Parts of methods",
                                [ABLATION, ABLATION], ["world"], [0])
    assert text.startswith("# Parts of methods\n") and text.count("## Parts\n") == 2
    assert "One run: world, seed 0." in text and "along the attack |" not in text
    assert "HS: answers" in text and "FA: correct" in text


PANEL = over("lam", ("0", "0.1", "0.2"), ("booster", "sft"), "0.2")
TABLE = table_of(PANEL, seeds=(0, 1), steps=(50, 100))


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.booleans(), min_size=24, max_size=24), st.sampled_from([PANEL, ABLATION]))
def test_gaps(tmp_path, figures, there, panel):
    """Any runs may be missing: every point has its row, with numbers where there is an attack."""
    runs = TABLE[["method", "seed", "stage"]].apply(tuple, axis=1)
    kept = {run for run, keep in zip(runs.unique(), there, strict=True) if keep}
    table = TABLE[[run in kept for run in runs]]
    text = panels.panel_report(table, tmp_path, panel, 0)
    attacked = set(table[table["stage"] == "attack"]["method"])
    points = [point for curve in panel.curves.values() for point in curve]
    for point, line in zip(points, rows_of(text)[1:], strict=True):
        assert (point.method in attacked) == any(character.isdigit() for cell in line[2:] for character in cell)
    missing = sum(point.method not in attacked for point in points)
    assert (f"Missing so far: {missing} of {len(points)} points." in text) == bool(missing)
    assert "nan" not in text
