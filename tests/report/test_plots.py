"""One style: what is drawn, with which colours, on which axes."""

import itertools
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer

from jaxvaccine import report
from jaxvaccine.report import plots
from jaxvaccine.report.statistics import estimate
from jaxvaccine.report.style import METHODS, family_of, styles
from tests.report.synthetic import labelled


def test_a_method_has_its_colour_and_marker_in_every_figure():
    one, other = styles(["sft", "booster", "t_vaccine"]), styles(["t_vaccine", "kl", "sft"])
    assert one["sft"] == other["sft"] == METHODS["sft"] and one["t_vaccine"] == other["t_vaccine"]
    assert styles(["sft+lisa"])["sft+lisa"] == METHODS["lisa"]
    for side in ("color", "marker"):
        assert len({getattr(style, side) for style in METHODS.values()}) == len(METHODS)


def test_variants_have_their_methods_colour_and_marks_of_their_own():
    methods = ["booster", "booster:lam=0.1", "booster:lam=0.2", "t_vaccine", "t_vaccine:freeze=released",
               "booster+lisa"]
    found = styles(methods)
    assert len({style.color for name, style in found.items() if family_of(name)[0] == "booster"}) == 1
    assert found["booster+lisa"].color == METHODS["lisa"].color and not found["booster+lisa"].filled
    assert len({(style.color, style.marker, style.filled) for style in found.values()}) == len(methods)
    assert not found["booster:lam=0.1"].filled and found["booster:lam=0.1"].face == "white"
    new = styles(["mine", "yours", "mine:x=1"])
    assert len({new["mine"], new["yours"], *METHODS.values()}) == 2 + len(METHODS)
    assert new["mine:x=1"].color == new["mine"].color


# What a colour is to a reader without one kind of cones (linear RGB; Machado, Oliveira and Fernandes, "A
# physiologically-based model for simulation of color vision deficiency", 2009, severity 1.0).
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]}


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_are_told_apart_by_the_colour_blind(deficiency):
    """CIE L*a*b* distances of at least 15, several times the just noticeable 2.3; the grey reference line aside."""
    def lab(color):
        rgb = np.array(matplotlib.colors.to_rgb(color))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen = np.clip(np.array(DEFICIENCIES[deficiency]) @ linear, 0, 1)
        to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        xyz = np.array(to_xyz) @ seen / [0.9505, 1, 1.089]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    colors = {name: lab(style.color) for name, style in METHODS.items() if name != "none"}
    distances = {pair: np.linalg.norm(colors[pair[0]] - colors[pair[1]])
                 for pair in itertools.combinations(colors, 2)}
    assert min(distances.values()) > 15, min(distances, key=distances.get)


def test_no_global_state():
    for path in Path(report.__file__).parent.glob("*.py"):
        assert "pyplot" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("values, rate, expected", [
    ((0, 0.05, 0.1, 0.2), False, "linear"), ((0.5, 1.5, 5, 15, 50), False, "log"), ((5, 20, 150), False, "log"),
    ((100, 500, 1000, 1500, 2000), False, "linear"), ((0.05, 0.1, 0.2, 0.4, 0.8), False, "log"),
    ((1e-4, 2e-4, 5e-4), True, "log"), ((1e-4, 2e-4, 5e-4), False, "linear"), ((8, 32), False, "linear"),
    ((1, 1000), False, "log"), ((0, 0.01, 0.1, 1), False, "symlog"), ((3,), True, "linear"), ((-1, 1, 100), False,
                                                                                              "linear"),
])  # fmt: skip
def test_scales(values, rate, expected):
    assert plots.scale_of(values, rate) == expected


def test_a_number_has_its_place_on_the_axis():
    _, (axis,) = plots.panels(1)
    plots.number_axis(axis, {5.0: "5.0", 0.5: "0.5", 50.0: "50", 1.5: "1.5"})
    assert axis.get_xscale() == "log" and axis.get_xticks().tolist() == [0.5, 1.5, 5, 50]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.5", "1.5", "5.0", "50"]
    low, high = axis.get_xlim()
    assert 0 < low < 0.5 and 50 < high < 100


def test_curves_have_means_bars_and_runs_where_they_are():
    _, (axis,) = plots.panels(1)
    found = [estimate([10.0, 30.0], True), None, estimate([50.0], True, (40, 61))]
    plots.curve(axis, [0, 1, 2], found, METHODS["booster"], "Booster", move=3)
    bars = labelled(axis)["Booster"]
    assert isinstance(bars, ErrorbarContainer)
    line = bars.lines[0]
    assert line.get_xdata().tolist() == [0, 2] and line.get_ydata().tolist() == [20, 50]
    assert line.get_color() == METHODS["booster"].color and line.get_marker() == METHODS["booster"].marker
    np.testing.assert_allclose([segment[:, 1] for segment in bars.lines[2][0].get_segments()], [[0, 100], [40, 61]])
    # The runs of the place that has several; moved on paper alone.
    runs = axis.lines[-1]
    assert runs.get_xydata().tolist() == [[0, 10], [0, 30]]
    moved = line.get_transform().transform((1, 1)) - axis.transData.transform((1, 1))
    np.testing.assert_allclose(moved, [3 / 72 * axis.figure.dpi, 0])


def test_bands():
    _, (axis,) = plots.panels(1)
    found = {10: estimate([90.0, 100.0]), 0: estimate([0.0, 4.0]), 20: estimate([50.0])}
    plots.band(axis, found, METHODS["sft"], "SFT", bounds=(0, 100))
    line = labelled(axis)["SFT"]
    assert line.get_xdata().tolist() == [0, 10, 20] and line.get_ydata().tolist() == [2, 95, 50]
    edges = axis.collections[0].get_paths()[0].vertices
    sd = np.std([90, 100], ddof=1)
    assert edges[:, 1].min() == 0 and edges[:, 1].max() == 100 and 95 - sd in edges[:, 1]
    assert axis.lines[-1].get_xdata().tolist() == [0, 0, 10, 10, 20]
    _, (axis,) = plots.panels(1)
    plots.band(axis, {0: estimate([0.0]), 1: estimate([4.0])}, METHODS["sft"], "SFT")
    plots.band(axis, {}, METHODS["sft"], "none")
    assert not axis.collections and len(axis.lines) == 1, "a single run has no band and no second point"


def test_dots():
    _, (axis,) = plots.panels(1)
    plots.dots(axis, ["first", "second, which has a name of more than one line"],
               {"A": (METHODS["sft"], [estimate([1.0, 3.0]), None]), "B": (METHODS["kl"], [None, estimate([9.0])]),
                "C": (METHODS["ewc"], [None, None])})
    found = labelled(axis)
    assert list(found) == ["A", "B"] and all(bars.lines[0].get_linestyle() == "None" for bars in found.values())
    assert [tuple(bars.lines[0].get_xydata()[0]) for bars in found.values()] == [(2, 0), (9, -1)]
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "first", "second, which has a name\nof more than one line"]


def test_there_is_room_for_means_intervals_and_runs():
    found = [estimate([1.0, 3.0]), estimate([2.0], own=(1.5, 40.0))]  # the first one's interval goes from -10.7 to 14.7
    for draw in (lambda axis: plots.curve(axis, [0, 5], found, METHODS["sft"], "SFT", 9),
                 lambda axis: plots.dots(axis, ["a", "b"], {"SFT": (METHODS["sft"], found)})):
        _, (axis,) = plots.panels(1)
        axis.axhline(2.0)
        axis.axvline(2.0)
        draw(axis)
        low, high = axis.get_ylim() if axis.get_yticklabels()[0].get_text() != "a" else axis.get_xlim()
        assert -20 < low < -10.7 and 40 < high < 50
    _, (axis,) = plots.panels(1)
    plots.band(axis, {0: estimate([0.0, 1.0, 50.0]), 1: estimate([0.0, 1.0, 2.0])}, METHODS["sft"], "SFT", 9, (0, 20))
    assert axis.get_ylim()[1] > 50


@pytest.mark.parametrize("values, expected", [
    ([10, 90], (-4, 104)), ([0, 20], (-1, 26)), ([90, 100], (74, 101)), ([], (-4, 104))])
def test_percentages_that_lie_close_are_looked_at_closely(values, expected):
    _, (axis,) = plots.panels(1)
    plots.percent_axis(axis, "x", [estimate([value], True) for value in values])
    assert axis.get_xlim() == expected


@pytest.mark.parametrize("values, low", [([0.1, 0.9], 0), ([-0.1, 0.9], -5), ([], -5)])
def test_an_interval_below_zero_is_cut_where_no_run_is(values, low):
    _, (axis,) = plots.panels(1)
    axis.set(xlim=(-5, 5), ylim=(-5, 5))
    for which in "xy":
        plots.positive_axis(axis, which, [estimate(values)] if values else [])
    assert [axis.get_xlim(), axis.get_ylim()] == 2 * [(-0.2 if low == 0 else low, 5)]


def test_colour_bars_between_panels():
    """Then every panel has its own y label: the bar's would be taken for that of the panel to its right."""
    for with_bar, expected in ((False, ["layer", ""]), (True, ["layer", "layer"])):
        figure, axes = plots.panels(2)
        for axis in axes:
            image = axis.pcolormesh([[1.0, 2.0]])
            if with_bar:
                figure.colorbar(image, ax=axis)
            plots.describe(axis, ylabel="layer")
        assert [axis.get_ylabel() for axis in axes] == expected


@pytest.mark.parametrize("means, percent, expected", [
    ([99.2, 100.0], True, "every mean is 99.2 to 100.0"), ([0.0, 1.0], True, "every mean is 0.0 to 1.0"),
    ([50.0, 53.0], True, None), ([1.0, 1.5], False, None), ([1.5, 1.5], False, "every mean is 1.5"),
    ([99.0], True, None), ([float("nan"), 3.0], True, None),
])  # fmt: skip
def test_constant_panels(means, percent, expected):
    assert plots.constant(means, percent) == expected
    assert plots.left_out({"FA": "why", "HS": "so"}) == "Not drawn: FA (why); HS (so).\n" and plots.left_out({}) == ""


@pytest.mark.parametrize("values, expected", [
    ([1, 0.1, 1e-3, 1e-4], True), ([1, 0.9, 0.8, 0.7, 1e-5], False), ([1, 0, 1e-4], False), ([1, -1], False),
    ([], False), ([float("nan"), 1.0], False)])
def test_decades(values, expected):
    assert plots.spans_decades(values) == expected


def test_labels():
    _, axes = plots.panels(5, columns=3)
    for axis in axes:
        plots.describe(axis, "a title that is far too long for the one line that there is above a panel of this size",
                       "attack step", "HS along the attack, long as it may be (%), lower is better")
    assert [bool(axis.get_ylabel()) for axis in axes] == [True, False, False, True, False]
    assert axes[0].get_ylabel() == "HS along the attack,\nlong as it may be (%),\nlower is better"
    assert axes[0].get_title(loc="left").count("\n") == 1


def test_the_legend_reads_in_rows_and_names_each_once():
    figure, axes = plots.panels(2)
    for axis in axes:
        axis.axhline(1, label="reference")
        for i in range(7):
            plots.curve(axis, [0], [estimate([1.0])], METHODS["sft"], f"method number {i}")
    height = figure.get_figheight()
    plots.legend(figure, axes, (plots.INTERVAL,))
    (legend,) = figure.legends
    texts, columns = [text.get_text() for text in legend.get_texts()], legend._ncols
    assert columns > 1 and figure.get_figheight() > height
    # Matplotlib fills columns, the first ones with one more.
    sizes = [len(texts) // columns + (column < len(texts) % columns) for column in range(columns)]
    starts = np.cumsum([0, *sizes[:-1]])
    read = [texts[start + row] for row in range(max(sizes)) for start, size in zip(starts, sizes, strict=True)
            if row < size]
    assert read == [*(f"method number {i}" for i in range(7)), "reference", "95% interval"]


def test_png_and_pdf(tmp_path):
    for name in ("a", "b"):
        figure, (axis,) = plots.panels(1)
        plots.curve(axis, [0, 1], [estimate([1.0, 2.0]), estimate([3.0])], METHODS["sft"], "SFT ‖∇a h‖")
        plots.legend(figure, [axis])
        plots.save(figure, tmp_path / f"{name}.png")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {"a.png", "a.pdf", "b.png", "b.pdf"}
    assert files["a.png"].startswith(b"\x89PNG") and files["a.pdf"].startswith(b"%PDF")
    assert files["a.png"] == files["b.png"] and files["a.pdf"] == files["b.pdf"]


def test_a_heat_map_says_its_numbers():
    """Whole, in a colour that can be read; a field without one has a dash."""
    _, (axis,) = plots.panels(1)
    plots.heat_map(axis, "HS", ["SFT", "Booster"], ["a", "b", "c"], np.array([[0, 49.6, np.nan], [100, 1, 2]]))
    texts = {text.get_position(): (text.get_text(), text.get_color()) for text in axis.texts}
    assert texts == {(0, 0): ("0", "black"), (1, 0): ("50", "black"), (2, 0): ("–", "black"),
                     (0, 1): ("100", "white"), (1, 1): ("1", "black"), (2, 1): ("2", "black")}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["SFT", "Booster"]
    (image,) = axis.images
    assert image.get_clim() == (0, 100)
