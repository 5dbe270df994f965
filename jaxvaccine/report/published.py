"""A paper's figures beside ours: published, ours, the difference, and in what the settings deviate."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd

from jaxvaccine.report import names, recipe, results, tables
from jaxvaccine.report.statistics import Estimate, estimate_rows

# The papers' two figures, as published.csv spells them.
HS, FA = "harmful_score", "accuracy"
AVERAGE = "average"


class Entry(Protocol):
    """A row of a paper's table: whose cell it is, and how the published figures spell its place."""

    method: str
    attack: str
    curve: str
    task: str
    p: str
    n: str
    setting: str
    backbone: int


def same_model(model: str, published: str) -> bool:
    """Whether a model's name or path is that of a published one, spelt in any way: "meta-llama/Llama-2-7b-hf"."""
    def plain(text: str) -> str:
        return "".join(c for c in text.lower().rsplit("/", 1)[-1] if c.isalnum())

    return plain(published) != "" and plain(model).startswith(plain(published))


def _alike(entries: Sequence[Entry]) -> frozenset[str]:
    """Which of task and n are the same in the whole table, so that a figure of another deviates as in any setting."""
    return frozenset(name for name in ("task", "n") if len({getattr(entry, name) for entry in entries}) == 1)


def lookup(published: pd.DataFrame, entry: Entry, measure: str, alike: frozenset[str]) -> pd.DataFrame:
    """The published rows of an entry's place and measure, a row for each model and source.

    alike: as of `_alike`; where there is no figure of the entry's own, one of another n is taken, of HS one of another
    task too: FA is a task's own.
    """
    found = published[(published["measure"] == measure) & (published["step"].isna()) & (published["layer"].isna())]
    # Where a setting is varied, figures have it beside the method's name; a curve's name is the method without it.
    found = found[found["method"].isin({entry.method, *([entry.curve] if entry.setting else [])})]
    for name, value in (("poison_ratio", entry.p), ("setting", entry.setting)):
        found = found[found[name] == value]
    for name, own in (("task", {entry.task}), ("n", {entry.n, ""})):
        same, others = found[found[name].isin(own)], found[found[name] != AVERAGE]
        if same.empty and name in alike and (name, measure) != ("task", FA):
            same = others[others[name].isin(others[name].head(1))]
        found = same
    return found


def comparison(table: pd.DataFrame, entries: Sequence[Entry], models: Sequence[str], published: pd.DataFrame,
               deviation: str, faced: Mapping[tuple[str, str], str]) -> str:
    """Markdown: of every entry HS and FA, published and ours, their difference, in what the settings deviate, which
    attack it faced where attacks differ, source.

    Args:
      table: results of the plan.
      entries: rows of the paper's table.
      models: the backbones that entries number.
      published: rows of published.csv that stand beside them; a place that is not in them has none.
      deviation: what is other than in the paper beside the model, in few words; "" for nothing.
      faced: as of `recipe.faced`.

    Where a judge of phrases judged, ours is not refused: it has a row of its own, and no difference from an HS.
    """
    attacked = results.attacked(table)
    harm = names.harm(table["measure"].unique())
    by_phrases = [names.NOT_REFUSED] if harm == names.NOT_REFUSED else []
    rows, alike = [], _alike(entries)
    for entry in entries:
        model = models[entry.backbone]
        of = results.pick(attacked, method=entry.method, attack=entry.attack, backbone=model)
        task = entry.task if (of["measure"] == entry.task).any() else names.accuracy(of["measure"].unique())
        for measure in (*by_phrases, HS, FA):
            ours = estimate_rows(results.pick(of, measure=task if measure == FA else measure), percent=True)
            shown = lookup(published, entry, measure, alike)
            # The model's own figure where there is one, else that of the model in most tables.
            own = shown[[same_model(model, name) for name in shown["model"]]] if len(shown) else shown
            figure = (own if len(own) else shown).head(1)
            rows.append(_row(entry, measure, ours, figure, model, deviation))
            if faced:
                rows[-1].insert(4, faced.get((entry.method, entry.attack), tables.NONE))
    header = ["method", "p", "n", "setting", "%", "published", "ours", "difference", "95% interval of ours",
              "deviates in", "source of the published"]
    return tables.table([*header[:4], *([recipe.HEADING] if faced else []), *header[4:]], rows)


def _row(entry: Entry, measure: str, ours: Estimate | None, figure: pd.DataFrame, model: str, deviation: str
         ) -> list[str]:
    row = [names.method(entry.method), entry.p, entry.n, entry.setting.replace("=", " = ").replace("_", " "),
           "FA" if measure == FA else names.measure(measure).name, tables.NONE, tables.NONE, "", "", "", ""]
    if ours:
        row[6] = f"{ours.mean:.2f}"
        row[8] = "" if np.isnan(ours.low) else f"{ours.low:.1f}–{ours.high:.1f}"
    if len(figure):
        one = figure.iloc[0]
        row[5] = f"{one['value']:.2f}"
        row[7] = f"{ours.mean - one['value']:+.2f}".replace("-", "−") if ours else ""
        other = [f"model ({one['model']})"] * (not same_model(model, one["model"]))
        other += [f"task ({one['task']})"] * (one["task"] != entry.task)
        other += [f"n ({one['n']})"] * (one["n"] not in ("", entry.n))
        row[9] = "; ".join(filter(None, (*other, deviation)))
        row[10] = f"{one['source']} ({one['confidence']})"
    return row


def unmatched(entries: Sequence[Entry], published: pd.DataFrame) -> str:
    """Markdown: the published figures that stand beside no entry; "" if there are none."""
    beside, alike = set(), _alike(entries)
    for entry in entries:
        for measure in (HS, FA):
            beside.update(lookup(published, entry, measure, alike).index)
    rest = published[~published.index.isin(beside) & published["measure"].isin((HS, FA))
                     & published["step"].isna() & published["layer"].isna()]
    if rest.empty:
        return ""
    rows = [[names.method(row.method), row.model, row.task, row.poison_ratio, row.n, row.setting,
             "FA" if row.measure == FA else "HS", f"{row.value:.2f}", f"{row.source} ({row.confidence})"]
            for row in rest.itertuples()]
    return "Published beside these, and without a counterpart here:\n\n" + tables.table(
        ["method", "model", "task", "p", "n", "setting", "%", "published", "source"], rows)


def averages(table: pd.DataFrame, entries: Sequence[Entry], models: Sequence[str], published: pd.DataFrame,
             over: str) -> str:
    """Markdown: the mean over a table's places (`over`: "poison_ratio" or "n"), published and ours; "" without any."""
    means = published[published[over] == AVERAGE]
    attacked, rows = results.attacked(table), []
    for method in dict.fromkeys(entry.curve for entry in entries):
        for measure in (HS, FA):
            values = []
            for entry in entries:
                of = results.pick(attacked, method=entry.method, attack=entry.attack, backbone=models[0])
                task = entry.task if (of["measure"] == entry.task).any() else names.accuracy(of["measure"].unique())
                found = results.pick(of, measure=task if measure == FA else measure)
                if entry.curve == method and entry.backbone == 0 and len(found):
                    values.append(found["value"].mean())
            figure = means[(means["method"] == method) & (means["measure"] == measure)]
            if len(figure):
                rows.append([names.method(method), "FA" if measure == FA else "HS", f"{figure.iloc[0]['value']:.2f}",
                             f"{np.mean(values):.2f} of {len(values)} places" if values else tables.NONE])
    return "" if not rows else tables.table(["mean over the table", "%", "published", "ours"], rows)


def deviations(ours: Mapping[str, Any], papers: Mapping[str, Any], stage: str) -> list[list[str]]:
    """[stage, setting, the paper's, ours] of every setting of a recipe that is another here."""
    return [[stage, name.replace("_", " "), _shown(value), _shown(ours.get(name))] for name, value in papers.items()
            if _shown(ours.get(name)) != _shown(value)]


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return tables.NONE if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)
