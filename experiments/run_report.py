"""The report of run.py: a table and a plot of several defenses, poison ratios and seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import grid_report, reports
from experiments.sweep_report import ALIGNED, MARKERS

# defense -> "aligned" or poison ratio as text -> results of evaluate.py, one per seed
Cells = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]


def write_grid_report(run_dir: Path, title: str, base: Mapping[str, Any] | None, cells: Cells,
                      seeds: Sequence[str]) -> str:
    """grid.png and report.md; returns the report's text.

    Args:
      run_dir: folder.
      title: headline.
      base: results of the model before alignment, {task: result}.
      cells: what there is so far; an interrupted run may have fewer seeds of some than of others.
      seeds: all that the run goes over.
    """
    found = [results for by in cells.values() for runs in by.values() for results in runs]
    tasks = reports.task_names(task for results in found for task in results)
    with_loss = any(reports.LOSS in results for results in found)
    names = [f"{name} %" for name in tasks.values()] + ["h(w)"] * with_loss
    rows = [["none", "as it comes", *_row([base], tasks, with_loss), ""]] if base else []
    for defense, by_stage in cells.items():
        for stage, runs in by_stage.items():
            name = stage if stage == ALIGNED else f"attacked, p = {stage}"
            rows.append([defense, name, *_row(runs, tasks, with_loss), str(len(runs))])
    header = ["defense", "model", *names, "seeds"]
    if len(seeds) == 1:
        header, rows = header[:-1], [row[:-1] for row in rows]
        spread = f"In parentheses 95% Wilson intervals over the test prompts; one seed, {seeds[0]}.\n"
    else:
        spread = (f"Mean ± standard deviation over seeds ({', '.join(seeds)}); in parentheses Student's 95% interval "
                  "of the mean, cut at 0 and 100. The model as it comes has no seed: 95% Wilson intervals over the "
                  "test prompts.\n")
    _plot(run_dir / "grid.png", tasks, base, cells)
    text = "\n".join([
        f"# {title}\n", reports.table(header, rows), spread, "![grid](grid.png)\n",
        "HS: answers that the judge calls unsafe (lower is better). FA: correct answers on the user's task (higher is "
        "better). Over-refusal: benign requests refused (lower is better)."
        + (" h(w): mean loss on harmful answers, nats a token.\n" if with_loss else "\n")])
    (run_dir / reports.REPORT).write_text(text, encoding="utf-8")
    return text


def _scores(runs: Sequence[Mapping[str, Any]], task: str) -> np.ndarray:
    return np.array([results[task]["score"] for results in runs])


def _row(runs: Sequence[Mapping[str, Any]], tasks: Sequence[str], with_loss: bool) -> list[str]:
    row = []
    for task in tasks:
        if any(task not in results for results in runs):
            row.append("–")
        else:
            row.append(reports.percent(runs[0][task]) if len(runs) == 1 else grid_report.summary(_scores(runs, task)))
    if with_loss:
        losses = np.array([results[reports.LOSS]["loss"] for results in runs])
        row.append(f"{losses.mean():.2f}" + (f" ± {losses.std(ddof=1):.2f}" if len(losses) > 1 else ""))
    return row


def _interval(runs: Sequence[Mapping[str, Any]], task: str) -> tuple[float, float]:
    """Of several seeds Student's, of one Wilson's."""
    return grid_report.interval(_scores(runs, task)) if len(runs) > 1 else tuple(runs[0][task]["interval"])


def _plot(path: Path, tasks: Mapping[str, str], base: Mapping[str, Any] | None, cells: Cells) -> None:
    figure, axes = reports.panels(len(tasks))
    ratios = sorted({stage for by in cells.values() for stage in by if stage != ALIGNED}, key=float)
    positions = [ALIGNED, *ratios]
    for axis, task in zip(axes, tasks, strict=True):
        for i, (defense, by_stage) in enumerate(cells.items()):
            stages = [stage for stage in positions if all(task in results for results in by_stage.get(stage, [{}]))]
            means = np.array([_scores(by_stage[stage], task).mean() for stage in stages])
            errors = np.abs(np.array([_interval(by_stage[stage], task) for stage in stages]).T - means)
            # A little aside, so that intervals of equal scores can be told apart.
            x = [positions.index(stage) + 0.06 * (i - (len(cells) - 1) / 2) for stage in stages]
            axis.errorbar(x, means, errors, marker=MARKERS[i % len(MARKERS)], markersize=4, capsize=3, linewidth=1,
                          label=defense)
        if base and task in base:
            axis.axhline(base[task]["score"], color="grey", linestyle=":", linewidth=1, label="before alignment")
        axis.set(title=f"{tasks[task]} (%)", ylim=(-4, 104))
        axis.set_xticks(range(len(positions)), [ALIGNED, *[f"p = {ratio}" for ratio in ratios]])
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    figure.savefig(path, dpi=130)
