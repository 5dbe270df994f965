"""What a person looks at: report.md and PNG plots in a run's folder."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxvaccine import runs

REPORT = "report.md"
TASK_NAMES = {"harmful_score": "HS", "sst2": "FA SST-2", "agnews": "FA AGNEWS", "gsm8k": "FA GSM8K",
              "over_refusal": "over-refusal", "alpaca_eval": "AlpacaEval win rate"}
LOSS = "harmful_loss"  # beside the tasks in an evaluation's results: h(w), no rate
# What is plotted of a step's metrics, where it is there.
CURVES = ("loss", "harmful_loss", "perturbed_harmful_loss", "gradient_norm", "activation_gradient_norm")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def task_names(tasks: Iterable[str]) -> dict[str, str]:
    """Names for table columns, in TASK_NAMES' order; FA says of which task only where there are several."""
    tasks = set(tasks)
    names = {task: name for task, name in TASK_NAMES.items() if task in tasks}
    several = sum(name.startswith("FA") for name in names.values()) > 1
    return {task: name if several or not name.startswith("FA") else "FA" for task, name in names.items()}


def percent(result: Mapping[str, Any] | None) -> str:
    """Score and 95% interval of a task's result, "–" without one."""
    if result is None:
        return "–"
    low, high = result["interval"]
    return f"{result['score']:.1f} ({low:.0f}–{high:.0f})"


def panels(columns: int, rows: int = 1):
    """(figure, axes) with that many axes side by side, row by row, on a canvas that needs no display."""
    # The object-oriented interface: pyplot would keep global state and ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def write_training_report(run_dir: Path, title: str) -> None:
    """metrics.png and report.md of a training run, from its metrics.jsonl and config.json."""
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curves = [name for name in CURVES if name in entries[0]]
    figure, axes = panels(len(curves))
    for axis, name in zip(axes, curves, strict=True):
        axis.plot([e["step"] for e in entries], [e[name] for e in entries], linewidth=1)
        axis.set(xlabel="step", title=name.replace("_", " "))
        axis.grid(alpha=0.3)
    figure.savefig(run_dir / "metrics.png", dpi=120)
    tail = entries[-max(1, len(entries) // 10):]
    rows = [[name.replace("_", " "), f"{entries[0][name]:.4g}", f"{sum(e[name] for e in tail) / len(tail):.4g}"]
            for name in curves]
    config = runs.read_config(run_dir)
    tokens = sum(e["tokens"] for e in entries)
    text = [f"# {title}\n", f"{len(entries)} steps, {tokens:,} tokens read.\n",
            table(["", "first step", f"mean of the last {len(tail)}"], rows), "![metrics](metrics.png)\n"]
    dropped = {name: count for name, count in config["data"].get("dropped", {}).items() if count}
    if dropped:
        text.append(f"Examples left out because their prompts fill --max_length alone: {dropped}.\n")
    text.append(_flags(config))
    (run_dir / REPORT).write_text("\n".join(text), encoding="utf-8")


def write_evaluation_report(run_dir: Path, what: str, results: Mapping[str, Any]) -> None:
    """report.md of an evaluation."""
    rows = [[TASK_NAMES[task], percent(result), str(result["n"]), str(result["empty"]),
             ", ".join(_also(result))]
            for task, result in results.items() if task != LOSS]
    loss = results.get(LOSS)
    text = [f"# Evaluation of {what}\n",
            table(["task", "% (95% interval)", "prompts", "empty answers", "also"], rows),
            *([f"Loss h(w) on {loss['n']} harmful examples: {loss['loss']:.4f} nats a token.\n"] if loss else []),
            "HS: answers that the judge calls unsafe. FA: answers equal to the label, or on GSM8K with the right final "
            "number; lenient accuracy: the answer holds the right label alone, or the right number anywhere. "
            "Over-refusal: refused benign requests. AlpacaEval: the judge prefers the answer to the "
            "reference, mean of both orders, a tie counts half; lengths in characters. Every prompt with its answer "
            "and verdict: predictions_*.jsonl.\n",
            *_harms(results.get("harmful_score", {})),
            *_unread_comparisons(results.get("alpaca_eval", {})),
            _flags(runs.read_config(run_dir))]
    (run_dir / REPORT).write_text("\n".join(text), encoding="utf-8")


def _also(result: Mapping[str, Any]) -> list[str]:
    """A task's further figures."""
    if "lenient_accuracy" in result:
        return ["lenient accuracy " + percent({"score": result["lenient_accuracy"],
                                               "interval": result["lenient_interval"]})]
    return [f"{name.replace('_', ' ')} {value:.2f}" for name, value in result.items()
            if isinstance(value, float) and name != "score"]


def _harms(result: Mapping[str, Any]) -> list[str]:
    """Sections on kinds of harm and on verdicts that could not be read, where there are any."""
    text = []
    if count := result.get("unparsable"):
        n, unsafe = result["n"], result["score"] / 100 * result["n"]
        text.append(f"{count} of {n + count} verdicts could not be read; HS leaves these answers out. Were all of them "
                    f"unsafe, it would be {100 * (unsafe + count) / (n + count):.1f}%.\n")
    if categories := result.get("categories"):
        text.append("## HS by harm category of the prompt\n")
        text.append(table(["category", "% (95% interval)", "prompts"],
                          [[name, percent(rate), str(rate["n"])] for name, rate in categories.items()]))
    if flagged := result.get("flagged"):
        text.append("## What the judge flags\n")
        text.append(table(["category", "answers"], [[name, str(n)] for name, n in flagged.items()]))
    return text


def _unread_comparisons(result: Mapping[str, Any]) -> list[str]:
    if count := result.get("unparsable"):
        return [f"{count} of {result['n'] + count} comparisons could not be read in one order or both; the win rate "
                "leaves these prompts out.\n"]
    return []


def _flags(config: Mapping[str, Any]) -> str:
    lines = "\n".join(f"- {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in config["flags"].items())
    return f"## Flags\n\n{lines}\n"
