"""Layers: which an attack is on, tables, correlations and figures."""

import numpy as np
import pytest

from jaxvaccine.report import layers
from jaxvaccine.report.statistics import correlation
from tests.report.synthetic import frame, labelled, layers_table, row, rows_of


@pytest.mark.parametrize("attack, expected", [
    ("only_layers=2", ("only", "", 2)), ("learning_rate=1e-3:only_layers=0:steps=60",
                                         ("only", "learning_rate=1e-3:steps=60", 0)),
    ("only_layers=0+1+3", ("all_but", "", 2)), ("poison_ratio=0.1", None), ("only_layers=0+1", None),
    ("only_layers=frozen", None),
])  # fmt: skip
def test_attacks_on_layers(attack, expected):
    assert layers.layer_attack(attack, 4) == expected


def test_readings():
    def read(x, y):
        return layers.reading(correlation(np.tile(x, (2, 3, 1)), np.tile(y, (2, 3, 1))))

    up = np.arange(6.0)
    assert read(up, up) == "larger norm, larger effect"
    assert read(up, -up) == "larger norm, smaller effect"
    assert read(up, np.array([1.0, 0, 3, 2, 1, 2])).startswith("undecided")
    assert read(up, np.zeros(6)).startswith("undecided")


def test_without_the_largest():
    norms, effects = np.array([[1.0, 9.0, 2.0], [7.0, 5.0, 6.0]]), np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    x, y = layers.without_largest(norms, effects)
    assert x.tolist() == [[1, 2], [5, 6]] and y.tolist() == [[0, 2], [4, 5]]


def test_arrays_from_a_table():
    table = layers_table(num_layers=4, backbones=("world", "b"), seeds=(0, 5))
    norms = layers.read_norms(table, "sft", ["world", "b"], [0, 5])
    assert norms.steps.tolist() == [0, 50, 100, 150]
    found = norms.values["weight_gradient_norm"]
    assert found.shape == (4, 2, 2, 4)
    expected = table.query("backbone == 'b' and seed == 5 and step == 100 and measure == 'weight_gradient_norm'")
    np.testing.assert_array_equal(found[2, 1, 1], expected.sort_values("layer")["value"])
    only, all_but = layers.read_attacks(table, "sft", ["world", "b"], [0, 5], 4)
    assert (only.kind, only.name) == ("only", "only one layer, p = 0.1") and only.steps.tolist() == [10, 20, 30]
    of = table.query("backbone == 'world' and seed == 0 and measure == 'harmful_score'")
    for attack, name, sign in ((only, "poison_ratio=0.1:only_layers=2", 1),
                               (all_but, "poison_ratio=0.1:only_layers=0+1+3", -1)):
        values = of[of["attack"] == name]["value"]
        np.testing.assert_allclose(attack.effect("harmful_score")[0, 0, 2], sign * values.mean())
    with pytest.raises(ValueError, match=r"vaccine: found measures by layer \[\], expected activation_gradient_norm"):
        layers.read_norms(table, "vaccine", ["world"], [0])


def test_the_report(tmp_path, figures):
    table = layers_table(backbones=("world", "b", "c"), seeds=(0, 1))
    text = layers.layers_report(table, tmp_path)
    rows = rows_of(text, "## SFT")
    assert [row[0] for row in rows] == ["layer", *map(str, range(6))]
    assert rows[0][5:9] == [f"only one layer, p = 0.1: {what}" for what in (
        "mean HS %", "HS at end %", "P(HS > 50) at end", "FA at end %")]
    assert rows[3][7].endswith(" of 6") and "There is no other method than SFT." in text
    assert "interval is over\nbackbones, each with its seeds, and takes the layers and the prompts as given" in text
    end = table.query("measure == 'activation_gradient_norm' and step == 150")
    shares = end["value"] / end.groupby(["backbone", "seed"])["value"].transform("sum") * 100
    assert rows[3][2] == f"{shares[end['layer'] == 2].mean():.1f} ± {shares[end['layer'] == 2].std():.1f}"
    reached = table.query("attack == 'poison_ratio=0.1:only_layers=2' and step == 30 and measure == 'harmful_score'")
    assert rows[3][6] == f"{reached['value'].mean():.1f} ± {reached['value'].std():.1f}"
    found = rows_of(text, "| attack | norm |")
    assert len(found) == 1 + 2 * 2 * 3 and {row[2] for row in found[1:]} == {"start", "mean", "end"}
    assert {row[6] for row in found[1:] if row[2] == "end"} == {"6 of 6"}
    assert all(row[7] == "larger norm, larger effect" for row in found[1:] if row[2] == "end")
    assert {row[9] for row in found[1:]} == {"–"}, "every layer learns the task alike: there is nothing to rank"
    assert set(figures) == {"sft_layers.png", "sft_attacks.png", "sft_scatter.png"}

    heat = figures["sft_layers.png"].axes[0]
    assert (heat.get_xlabel(), heat.get_ylabel()) == ("alignment step", "layer")
    values = np.asarray(heat.collections[0].get_array())
    assert values.shape == (6, 4) and values.sum(0) == pytest.approx(100)
    assert heat.get_xlim() == (-25, 175), "steps are in the middle of their cells"
    attacks = figures["sft_attacks.png"].axes[0]
    assert list(labelled(attacks)) == list("012345") and attacks.get_ylabel() == "mean HS (%), lower is better"
    scatter = figures["sft_scatter.png"].axes[2]
    assert scatter.get_xscale() == "log"
    assert scatter.get_title(loc="left").startswith("all layers but one, p = 0.1: ρ = ")
    assert sum(len(line.get_xdata()) for line in scatter.lines) == 3 * 2 * 6
    assert scatter.get_xlabel() == "share of ‖∇a h‖, attention output (%)"


def test_runs_that_are_missing(tmp_path, figures):
    """A seed without attacks on a layer has no correlation; the others have theirs."""
    table = layers_table(seeds=(0, 1, 2))
    gone = (table["seed"] == 1) & table["attack"].str.endswith("only_layers=4")
    text = layers.layers_report(table[~gone], tmp_path)
    found = rows_of(text, "| attack | norm |")
    assert {row[6].split(" of ")[1] for row in found[1:]} == {"3"}
    assert any(row[0].startswith("only") and row[2] == "end" and row[6] == "2 of 3" for row in found[1:])
    assert "nan" not in text
    # Norms without any attack.
    text = layers.layers_report(table[table["stage"] == "alignment"], tmp_path)
    assert "| attack | norm |" not in text and "scatter" not in text and rows_of(text)[1][0] == "0"


def test_draws(tmp_path, figures):
    probabilities = np.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    layers.plot_draws(tmp_path / "layers.png", [0, 5, 10], probabilities, probabilities > 0.4)
    left, right = figures["layers.png"].axes[:2]
    np.testing.assert_allclose(np.asarray(left.collections[0].get_array()), probabilities.T)
    np.testing.assert_array_equal(np.asarray(right.collections[0].get_array()), (probabilities > 0.4).T)
    assert right.get_title(loc="left") == "Active layers (black)"
    table = frame([row(measure, float(value), method="t_vaccine", step=step, layer=float(layer), seed=1)
                   for i, step in enumerate((0, 5, 10)) for layer in (1, 0)
                   for measure, value in (("probabilities", probabilities[i, layer]),
                                          ("active_layers", probabilities[i, layer] > 0.4))])
    layers.plot_plan_draws(tmp_path / "again.png", table, "world", "t_vaccine", 1)
    for axis, before in zip(figures["again.png"].axes, (left, right), strict=False):
        np.testing.assert_array_equal(axis.collections[0].get_array(), before.collections[0].get_array())
    with pytest.raises(ValueError, match="t_vaccine on world, seed 0: found no probabilities"):
        layers.plot_plan_draws(tmp_path / "none.png", table, "world", "t_vaccine", 0)
