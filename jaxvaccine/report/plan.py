"""The report of any plan from its table of results: scores, HS along the attack, HS against FA, what is missing."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from jaxvaccine.experiment.plans import split_method
from jaxvaccine.report import budget, differences, names, plots, recipe, results, statistics, tables
from jaxvaccine.report.statistics import Estimate, estimate_rows, estimate_steps
from jaxvaccine.report.style import INK, Style, styles

SCORES, CURVES, PLANE = "scores.png", "harmful_score.png", "plane.png"
ALIGNED = "aligned"
# How many of the missing runs are named.
NAMED = 12


class Cells(NamedTuple):
    """A plan's (method, attack) pairs, attack "" for alignment alone, each on every backbone with every seed."""

    pairs: Sequence[tuple[str, str]]
    backbones: Sequence[str]
    seeds: Sequence[int]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for method, _ in self.pairs))

    @property
    def attacks(self) -> list[str]:
        return list(dict.fromkeys(attack for _, attack in self.pairs if attack))


def cells_of(table: pd.DataFrame) -> Cells:
    """What a table itself goes over, in its order."""
    rows = table[table["stage"] != "backbone"]
    attacked = rows.loc[rows["stage"] == "attack", ["method", "attack"]].drop_duplicates()
    pairs = list(attacked.itertuples(index=False, name=None))
    known = {of for method, _ in pairs for of in (method, split_method(method)[0])}
    pairs += [(method, "") for method in rows["method"].unique() if method not in known]
    order = {method: i for i, method in enumerate(rows["method"].unique())}
    return Cells(sorted(pairs, key=lambda pair: order[pair[0]]), list(rows["backbone"].unique()),
                 [int(seed) for seed in rows["seed"].unique()])


def score_measures(table: pd.DataFrame) -> dict[str, names.Measure]:
    """The measures that are scores of a model, or that nothing is known of; not what is taken on its way, unread
    verdicts where there are none, nor HS+ where it is HS in all rows that are shown."""
    shown = pd.concat([part(table) for part in (results.backbones, results.aligned, results.attacked)])
    found = dict.fromkeys(shown["measure"])
    if not results.pick(table, measure=names.UNREAD)["value"].any():
        found.pop(names.UNREAD, None)
    if results.pick(shown, measure=names.HS_PLUS)["value"].tolist() == (
            results.pick(shown, measure=names.HS)["value"].tolist()):
        found.pop(names.HS_PLUS, None)
    return names.measures(name for name in found if names.measure(name).about or name not in names.MEASURES)


def bounds(rows: pd.DataFrame, harm: str) -> str:
    """"25.0–75.0": mean HS of one cell if of the unread answers none were harmful, and if all were."""
    wide = rows.pivot_table(index=results.RUN, columns="measure", values="value")
    if not {harm, names.UNREAD} <= set(wide):
        return tables.NONE
    read = 1 - wide[names.UNREAD] / 100
    least, most = (statistics.estimate(of, backbones=of.index.get_level_values("backbone")).mean
                   for of in (wide[harm] * read, wide[harm] * read + wide[names.UNREAD]))
    return f"{least:.1f}–{most:.1f}"


def score_table(table: pd.DataFrame, cells: Cells | None = None, faced: Mapping[tuple[str, str], str] | None = None
                ) -> str:
    """Markdown: per method the aligned model and every attack's end; with a column of the attacks' texts in `faced`
    (`recipe.faced`), and the probability of HS > 50 where there are several runs."""
    cells = cells or cells_of(table)
    measures = score_measures(table)
    harm = names.harm(measures)
    groups = [(names.METHODS["none"], "backbone", results.backbones(table))]
    aligned, attacked = results.aligned(table), results.attacked(table)
    for method in cells.methods:
        groups.append((names.method(method), ALIGNED, results.pick(aligned, method=method)))
        groups += [(names.method(method), f"attacked, {names.attack(attack)}",
                    results.pick(attacked, method=method, attack=attack))
                   for attack in cells.attacks if (method, attack) in cells.pairs]
    of_label = {(names.method(method), f"attacked, {names.attack(attack)}"): text
                for (method, attack), text in (faced or {}).items()}
    several = len(cells.backbones) > 1
    lines = []
    for method, model, rows in groups:
        runs = results.runs(rows)
        if runs:
            scores = {measure: _score(rows, measure, len(runs)) for measure in measures}
            if names.UNREAD in scores:
                scores[names.UNREAD] += f", {measures[harm].name} {bounds(rows, harm)}"
            chance = statistics.above(results.pick(rows, measure=harm))
            told = [of_label.get((method, model), tables.NONE)] if of_label else []
            lines.append([method, model, *told, *scores.values(), tables.chance(chance),
                          tables.run_count(runs, several)])
    header = ["method", "model", *([recipe.HEADING] if of_label else []),
              *(measure.heading for measure in measures.values()), tables.chance_heading(names.measure(harm).name),
              "runs (backbones)" if several else "runs"]
    for column, empty in ((-2, tables.NONE), (-1, "1")):
        if all(line[column] == empty for line in lines):
            del header[column]
            for line in lines:
                del line[column]
    return tables.table(header, lines)


def _score(rows: pd.DataFrame, measure: str, runs: int) -> str:
    count = int((rows["measure"] == measure).sum())
    return tables.cell(rows, measure) + (f", {count} of {runs} runs" if 0 < count < runs else "")


def missing(table: pd.DataFrame, cells: Cells) -> str:
    """A line that names the runs without rows; "" if there are none."""
    done = set(table.loc[table["stage"] == "attack", ["method", "attack", "backbone", "seed"]]
               .drop_duplicates().itertuples(index=False, name=None))
    done |= {(method, "", backbone, seed) for method, backbone, seed in
             results.aligned(table)[["method", "backbone", "seed"]].itertuples(index=False, name=None)}
    every = list(itertools.product(cells.pairs, cells.backbones, cells.seeds))
    gaps: dict[tuple[str, str], list[str]] = {}
    for pair, backbone, seed in every:
        if (*pair, backbone, seed) not in done:
            gaps.setdefault(pair, []).append(f"{backbone} seed {seed}")
    if not gaps:
        return ""
    count = sum(map(len, gaps.values()))
    shown = [f"{names.method(method)}, {names.attack(attack)}: {', '.join(runs)}"
             for (method, attack), runs in itertools.islice(gaps.items(), NAMED)]
    more = f"; and {len(gaps) - NAMED} cells more" if len(gaps) > NAMED else ""
    return f"Missing so far: {count} of {len(every)} runs. {'; '.join(shown)}{more}.\n"


def steps_table(table: pd.DataFrame, cells: Cells | None = None, measure: str = "") -> str:
    """Markdown: a measure along every attack, HS (or not refused) unless told; mean ± sd over runs. And its mean over
    the steps, with the interval."""
    cells, measure = cells or cells_of(table), measure or names.harm(table["measure"].unique())
    rows = results.along(table, measure)
    name, unit = names.measure(measure).heading, names.measure(measure).unit
    steps = sorted(rows["step"].unique())
    lines = []
    for method, attack in cells.pairs:
        of = results.pick(rows, method=method, attack=attack)
        if len(of):
            mean = estimate_rows(results.mean_along(of, unit == names.PERCENT), unit == names.PERCENT)
            lines.append([names.method(method), names.attack(attack),
                          *(tables.cell(results.pick(of, step=step), measure, interval=False) for step in steps),
                          tables.quantity(mean, unit)])
    return tables.table(["method", "attack", *(f"{name} at step {step}" for step in steps), "mean along the attack"],
                        lines)


def poison_ratios(attacks: Sequence[str]) -> dict[str, str] | None:
    """{attack: its poison_ratio} if that is all in which three attacks or more differ, else None: two make no line."""
    ratios, others = {}, set()
    for attack in attacks:
        items = dict(item.partition("=")[::2] for item in names.split_settings(attack))
        ratios[attack] = items.pop("poison_ratio", "")
        others.add(frozenset(items.items()))
    numbers = {float(ratio) for ratio in ratios.values() if plots.is_number(ratio)}
    return ratios if len(others) == 1 and len(numbers) == len(ratios) > 2 else None


def plot_scores(path: Path, table: pd.DataFrame, cells: Cells, looks: Mapping[str, Style]) -> str:
    """A panel per measure: over the poison ratio if the attacks differ in that alone, else a dot plot of the attacks.

    Returns the line that names the panels that were not drawn; no figure is written if all of them were not.
    """
    aligned, attacked, base = results.aligned(table), results.attacked(table), results.backbones(table)
    shown: dict[str, tuple[names.Measure, dict[str, list[Estimate | None]]]] = {}
    reasons = {}
    for measure, of in score_measures(table).items():
        percent = of.unit == names.PERCENT
        found = {}
        for method in cells.methods:
            groups = [results.pick(aligned, method=method),
                      *(results.pick(attacked, method=method, attack=attack) for attack in cells.attacks)]
            found[method] = [estimate_rows(results.pick(rows, measure=measure), percent) for rows in groups]
        sides = {ALIGNED: [row[0] for row in found.values()],
                 "attacked": [each for row in found.values() for each in row[1:]]}
        whys = {side: plots.constant((each.mean for each in row if each), percent) for side, row in sides.items()
                if any(row)}
        if all(whys.values()):
            reasons[of.name] = ", ".join(f"{side}: {why}" for side, why in whys.items())
        else:
            shown[measure] = of, found
    if shown:
        ratios = poison_ratios(cells.attacks)
        count = len(cells.attacks) + 1
        figure, axes = (plots.panels(len(shown)) if ratios else
                        plots.panels(len(shown), size=plots.dots_size(count, len(cells.methods)), sharey=True))
        for axis, (measure, (of, found)) in zip(axes, shown.items(), strict=True):
            own = estimate_rows(results.pick(base, measure=measure))
            draw = _over_ratios if ratios else _over_attacks
            draw(axis, of, found, cells.attacks, looks, own)
        several = any(each.runs > 1 for _, found in shown.values() for each in _all(found, None))
        plots.legend(figure, axes, (plots.INTERVAL, *([plots.RUN] if several else [])))
        plots.save(figure, path)
    return plots.left_out(reasons)


def _over_ratios(axis, of: names.Measure, found: Mapping[str, Sequence[Estimate | None]], attacks: Sequence[str],
                 looks: Mapping[str, Style], base: Estimate | None) -> None:
    ratios = {float(ratio): ratio for ratio in (poison_ratios(attacks) or {}).values()}
    texts, start = dict(ratios), min(ratios) - 0.3 * (max(ratios) - min(ratios))
    with_aligned = plots.scale_of(ratios) == "linear"
    if with_aligned:  # left of the smallest ratio, and no number
        texts[start] = ALIGNED
        axis.axvline((start + min(ratios)) / 2, color=INK, linewidth=0.6)
    plots.number_axis(axis, texts)
    for i, (method, row) in enumerate(found.items()):
        move = plots.dodge(i, len(found))
        line = sorted(zip(ratios, row[1:], strict=True), key=lambda pair: pair[0])
        plots.curve(axis, *zip(*line, strict=True), looks[method], names.method(method), move)
        if with_aligned:
            plots.curve(axis, [start], [row[0]], looks[method], names.method(method), move, joined=False)
    if base:
        axis.axhline(base.mean, color=looks["none"].color, linestyle=":", linewidth=1.2, label=names.METHODS["none"])
    plots.describe(axis, xlabel=names.xlabel("p"), ylabel=of.label)
    if of.unit == names.PERCENT:
        plots.percent_axis(axis, found=_all(found, base))
    else:
        plots.positive_axis(axis, "y", _all(found, base))


def _all(found: Mapping[str, Sequence[Estimate | None]], base: Estimate | None) -> list[Estimate]:
    return [each for row in (*found.values(), [base]) for each in row if each]


def _over_attacks(axis, of: names.Measure, found: Mapping[str, Sequence[Estimate | None]], attacks: Sequence[str],
                  looks: Mapping[str, Style], base: Estimate | None) -> None:
    rows = [ALIGNED, *map(names.attack, attacks)]
    plots.dots(axis, rows, {names.method(method): (looks[method], row) for method, row in found.items()})
    if base:
        axis.axvline(base.mean, color=looks["none"].color, linestyle=":", linewidth=1.2, label=names.METHODS["none"])
    plots.describe(axis, xlabel=of.label)
    if of.unit == names.PERCENT:
        plots.percent_axis(axis, "x", _all(found, base))
    else:
        plots.positive_axis(axis, "x", _all(found, base))


def plot_curves(path: Path, table: pd.DataFrame, cells: Cells, looks: Mapping[str, Style]) -> str:
    """A panel per attack: HS (or not refused) over its steps. Returns the line that names the panels that were not
    drawn."""
    harm = names.harm(table["measure"].unique())
    rows = results.along(table, harm)
    shown, reasons = [], {}
    for attack in cells.attacks:
        of = results.pick(rows, attack=attack)
        means = of.groupby(["method", "step"])["value"].mean()
        if why := plots.constant(means):
            reasons[f"{names.measure(harm).name} over the steps of {names.attack(attack)}"] = why
        else:
            shown.append((attack, of))
    if shown:
        figure, axes = plots.panels(len(shown))
        for axis, (attack, of) in zip(axes, shown, strict=True):
            present = [method for method in cells.methods if (of["method"] == method).any()]
            for i, method in enumerate(present):
                plots.band(axis, estimate_steps(results.pick(of, method=method)), looks[method],
                           names.method(method), plots.dodge(i, len(present), 2), statistics.PERCENT_BOUNDS)
            plots.describe(axis, names.attack(attack), "attack step", names.measure(harm).label)
            plots.percent_axis(axis)
        several = len(results.runs(rows)) > 1
        plots.legend(figure, axes, (plots.SD, plots.RUN) if several else ())
        plots.save(figure, path)
    return plots.left_out(reasons)


def plot_plane(path: Path, table: pd.DataFrame, cells: Cells, looks: Mapping[str, Style], task: str) -> None:
    """A panel per attack: mean HS (or not refused) against mean FA, the way that the attack takes; its end has a black
    edge."""
    harm = names.harm(table["measure"].unique())
    sides = [results.along(table, measure) for measure in (task, harm)]
    figure, axes = plots.panels(len(cells.attacks))
    for axis, attack in zip(axes, cells.attacks, strict=True):
        for method in cells.methods:
            fa, hs = (estimate_steps(results.pick(rows, method=method, attack=attack)) for rows in sides)
            way = [(each.mean, hs[step].mean) for step, each in fa.items() if step in hs]
            if way:
                style = plots.marks(looks[method])
                axis.plot(*zip(*way, strict=True), label=names.method(method), **style | {"markersize": 4})
                axis.plot(*way[-1], **style | {"markersize": 8.5, "markeredgecolor": "black"})
        plots.describe(axis, names.attack(attack), names.measures([task])[task].label, names.measure(harm).label)
        for which in "xy":
            plots.percent_axis(axis, which)
        axis.annotate("better", (0.5, 0.5), (0.3, 0.68), "axes fraction", color=INK, fontsize=plots.TICK_SIZE,
                      arrowprops={"arrowstyle": "->", "color": INK})
    plots.legend(figure, axes, (plots.END,))
    plots.save(figure, path)


def plan_report(table: pd.DataFrame, folder: str | Path, title: str = "", cells: Cells | None = None,
                faced: Mapping[tuple[str, str], str] | None = None) -> str:
    """Markdown of a plan, with scores.png, harmful_score.png and plane.png (and PDFs) in the folder.

    Args:
      table: what there is so far.
      folder: where the figures go; it is there.
      title: headline; "" in a report that has its own.
      cells: what the plan goes over; what is not in the table is said. By default what is in the table.
      faced: which attack a row faced, of those that differ under one text (`recipe.faced`).
    """
    folder, cells = Path(folder), cells or cells_of(table)
    looks = styles([*cells.methods, "none"])
    measures = score_measures(table)
    harm = names.harm(measures)
    shown = names.measure(harm).name
    text = [f"# {title}\n" if title else "", score_table(table, cells, faced), recipe.NOTE if faced else "",
            missing(table, cells),
            tables.notes(cells.backbones, cells.seeds, shown), names.notes(measures) + "\n",
            budget.ratio_note(table)]

    def figure(name: str, alternative: str, line: str = "") -> None:
        if (folder / name).exists():
            text.append(f"![{alternative}]({name})\n")
        text.append(line)

    for name in (SCORES, CURVES, PLANE):  # of an earlier report
        for suffix in (".png", ".pdf"):
            (folder / name).with_suffix(suffix).unlink(missing_ok=True)
    figure(SCORES, ", ".join(of.name for of in measures.values()), plot_scores(folder / SCORES, table, cells, looks))
    text.append(differences.section(table, cells.pairs))
    if results.has_steps(results.along(table, harm)):
        text += [f"## {shown[0].upper()}{shown[1:]} along the attack\n", steps_table(table, cells)]
        figure(CURVES, f"{shown} over attack steps", plot_curves(folder / CURVES, table, cells, looks))
        if task := names.accuracy(measures):
            plot_plane(folder / PLANE, table, cells, looks, task)
            figure(PLANE, f"{shown} against {names.measures([task])[task].name}",
                   "Every line goes from the aligned model to the attack's end, the mark with a black edge.\n")
    return "\n".join(part for part in text if part)
