"""The report of an evaluation: report.md with scores, intervals, kinds of harm and what could not be read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxvaccine.experiment import runs
from jaxvaccine.report import accounts, names, tables
from jaxvaccine.report.training import flag_list

ABOUT = ("HS: answers that the judge calls unsafe. FA: answers equal to the label, or on GSM8K with the right final "
         "number; lenient accuracy: the answer holds the right label alone, or the right number anywhere. "
         "Over-refusal: refused benign requests. AlpacaEval: the judge prefers the answer to the reference, mean of "
         "both orders, a tie counts half; lengths in characters. Every prompt with its answer and verdict: "
         "predictions_*.jsonl.\n")


def write_evaluation_report(run_dir: Path, what: str, results: Mapping[str, Any]) -> None:
    """report.md of an evaluation.

    Args:
      run_dir: its folder.
      what: the model that was evaluated.
      results: task -> {score, interval, n, empty, …}; names.LOSS -> {loss, n}, in nats a token.
    """
    config = runs.read_config(run_dir)
    rows = [[names.measure(task).name, tables.rate(result), str(result["n"]), str(result["empty"]),
             ", ".join(_also(result))]
            for task, result in results.items() if task != names.LOSS]
    loss = results.get(names.LOSS)
    text = [f"# Evaluation of {what}\n",
            tables.table(["task", "% (95% interval)", "prompts", "empty answers", "also"], rows),
            *([f"Loss h(w) on {loss['n']} harmful examples: {loss['loss']:.4f} nats a token.\n"] if loss else []),
            ABOUT, *_harms(results.get(names.HS, {})), *_unread_comparisons(results.get("alpaca_eval", {})),
            accounts.section(config["data"].get("accounts", {})), flag_list(config)]
    tables.write_report(run_dir, "\n".join(part for part in text if part))


def _also(result: Mapping[str, Any]) -> list[str]:
    """A task's further figures."""
    if "lenient_accuracy" in result:
        return ["lenient accuracy " + tables.rate({"score": result["lenient_accuracy"],
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
        text.append(tables.table(["category", "% (95% interval)", "prompts"],
                                 [[name, tables.rate(rate), str(rate["n"])] for name, rate in categories.items()]))
    if flagged := result.get("flagged"):
        text.append("## What the judge flags\n")
        text.append(tables.table(["category", "answers"], [[name, str(n)] for name, n in flagged.items()]))
    return text


def _unread_comparisons(result: Mapping[str, Any]) -> list[str]:
    if count := result.get("unparsable"):
        return [f"{count} of {result['n'] + count} comparisons could not be read in one order or both; the win rate "
                "leaves these prompts out.\n"]
    return []
