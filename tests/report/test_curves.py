import numpy as np
import pandas as pd

from jaxvaccine.report import curves, differences
from jaxvaccine.report.style import METHODS
from tests.report.synthetic import frame, labelled, row, rows_of, study_table


def report(table, folder, **changes):
    return curves.curves_report(table, folder, "Statistics", **{
        "alignment": ["harmful_loss", "reduction"], "along": ["harmful_training_loss", "harmful_score"],
        "note": "h(w): so.", "name": "statistics", **changes})


def test_the_report(tmp_path, figures):
    table = study_table(("sft", "booster"))
    text = report(table, tmp_path)
    rows = rows_of(text)
    assert rows[0] == ["method", "step", "h(w) (nats per token)", "h(w) − h(w') (nats per token)"]
    assert [row[:2] for row in rows[1:]] == [[name, step] for name in ("SFT", "Booster") for step in ("0", "75", "150")]
    along = rows_of(text, "harmful training loss (nats per token):")
    assert along[0] == ["method", *(f"step {step}" for step in range(0, 101, 20))]
    # An attack's own step 0, and the aligned model's HS.
    start = table.query("measure == 'harmful_training_loss' and step == 0 and method == 'sft'")["value"]
    assert along[1][1] == f"{start.mean():.2f} ± {start.std():.2f}"
    assert rows_of(text, "HS (%), lower is better:")[1][1] == "2.0 ± 0.0"
    assert "## Along the attack: p = 0.1" in text and text.endswith("h(w): so.\n")
    assert "Mean ± standard deviation over seeds (0, 1, 2) of world. In parentheses: 95% interval" in text
    harm = rows_of(text, "HS (%), lower is better:")
    assert harm[0][-2:] == ["end (95% interval)", "P(HS > 50)"] and harm[1][-1].endswith("3 of 3")
    end = table.query("measure == 'harmful_score' and step == 100 and method == 'sft'")["value"]
    assert harm[1][-2].startswith(f"{end.mean():.1f} ± {end.std():.1f} (")
    assert [row[:2] for row in rows_of(text, differences.HEADING)[1:]] == [["Booster", "aligned"], [
        "Booster", "attacked, p = 0.1"]]
    axes = figures["statistics.png"].axes
    assert [axis.get_xlabel() for axis in axes] == ["alignment step"] * 2 + ["attack step"] * 2
    assert axes[0].get_ylabel() == "h(w) (nats per token)" and axes[3].get_ylim() == (-4, 104)
    line = labelled(axes[0])["Booster"]
    assert line.get_color() == METHODS["booster"].color and line.get_xdata().tolist() == list(range(0, 151, 15))
    of = table.query("measure == 'harmful_loss' and method == 'booster' and step == 75")["value"]
    np.testing.assert_allclose(line.get_ydata()[5], of.mean())


def test_a_single_run_and_what_never_changes(tmp_path, figures):
    table = study_table(("sft",), seeds=(0,))
    table.loc[table["measure"] == "reduction", "value"] = 0.25
    text = report(table, tmp_path)
    assert rows_of(text)[2] == ["SFT", "75", f"{table.query('step == 75')['value'].iloc[0]:.3g}", "0.25"]
    assert "Not drawn: h(w) − h(w') (every mean is 0.25).\n" in text
    assert len(figures["statistics.png"].axes) == 3 and not figures["statistics.png"].axes[0].collections


def test_a_band_of_losses_does_not_go_below_zero(tmp_path, figures):
    def lowest(*values):
        report(frame([row("harmful_loss", value, step=step, seed=seed) for step in (0, 9)
                      for seed, value in enumerate((*values, 2.0 + step))]), tmp_path,
               alignment=["harmful_loss"], along=())
        return figures["statistics.png"].axes[0].collections[0].get_paths()[0].vertices[:, 1].min()

    assert lowest(0.1, 0.2) == 0 and lowest(-0.1, 0.2) < -0.5


def test_the_alignment_alone(tmp_path, figures):
    text = report(study_table(("booster", "booster:exact=true")), tmp_path, along=(), name="approximation")
    assert "Along the attack" not in text and set(figures) == {"approximation.png"}
    assert {row[0] for row in rows_of(text)[1:]} == {"Booster", "Booster (exact)"}


def test_several_attacks_have_figures_of_their_own(tmp_path, figures):
    table = study_table(("sft",))
    other = table[table["stage"] == "attack"].assign(attack="poison_ratio=0.2")
    text = report(pd.concat([table, other]), tmp_path)
    assert set(figures) == {"statistics.png", "statistics_1.png"} and "(statistics_1.png)" in text


def test_steps_that_one_method_lacks_and_decades(tmp_path, figures):
    table = frame([row("harmful_loss", value, method=method, step=step, seed=seed)
                   for method, along in {"sft": {0: 2.0, 10: 0.001}, "booster": {20: 0.001}}.items()
                   for step, value in along.items() for seed in (0, 1)])
    text = report(table, tmp_path, alignment=["harmful_loss", "reduction"], along=())
    assert rows_of(text)[1:3] == [["SFT", "0", "2 ± 0", "–"], ["SFT", "10", "0.001 ± 0", "–"]]
    assert "h(w) − h(w') (there are no values)" in text
    assert figures["statistics.png"].axes[0].get_yscale() == "log"
