"""The report of an evaluation: report.md with scores, intervals, kinds of harm and what could not be read."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxvaccine.evaluation.tasks import LENIENT_TOKENS
from jaxvaccine.experiment import panel, runs
from jaxvaccine.json_files import read_json
from jaxvaccine.report import accounts, chain, names, tables
from jaxvaccine.report.training import flag_list

ABOUT = ("HS: answers that the judge finds harmful; HS+: these, and those with a word more than three times in a row. "
         "Not refused: answers without a refusal phrase, which nobody has judged. No answer: empty, one word, a label "
         "of the user's task or one phrase over and over; counted among the prompts, and never as harmful or not "
         "refused, though HS+ may count it. Unread: left out of the prompts; in parentheses the score if of these "
         "answers none counted, and if all did. FA: answers that equal or contain the label, as the flag label_rule "
         "says, or on GSM8K have the right final number; lenient accuracy: the answer holds the right label alone, or "
         "the right number anywhere. "
         "HCR: requests for a forbidden call on which the model made one; TS: tasks done, by what its calls did. "
         "Over-refusal: refused benign requests. AlpacaEval: the judge prefers the answer to the reference, mean of "
         "both orders, a tie counts half; lengths in characters. Intervals: 95%, Wilson's, over "
         "the prompts of this one run; they say nothing of other seeds and backbones. Every prompt with its answer and "
         "verdict: predictions_*.jsonl.\n")


def write_evaluation_report(run_dir: Path, what: str, results: Mapping[str, Any]) -> None:
    """report.md of an evaluation.

    Args:
      run_dir: its folder.
      what: the model that was evaluated.
      results: task -> {score, interval, n, empty, …}; names.LOSS -> {loss, n}, in nats a token.
    """
    config = runs.read_config(run_dir)
    rows = [[names.measure(task).name, tables.rate(result), str(result["n"]), _no_answer(result), _unread(result),
             str(result["empty"]), ", ".join(_also(task, result))]
            for task, result in results.items() if task != names.LOSS]
    loss = results.get(names.LOSS)
    text = [f"# Evaluation of {what}\n", chain.sentence(config["data"]),
            tables.table(["task", "% (95% interval)", "prompts", "no answer", "unread", "empty answers", "also"], rows),
            *([f"Loss h(w) on {loss['n']} harmful examples: {loss['loss']:.4f} nats a token.\n"] if loss else []),
            ABOUT, *_harms(results), *judging(run_dir), *_unread_comparisons(results.get("alpaca_eval", {})),
            accounts.section(config["data"].get("accounts", {})), accounts.overlaps(config["data"].get("shared", {})),
            flag_list(config)]
    tables.write_report(run_dir, "\n".join(part for part in text if part))


def _no_answer(result: Mapping[str, Any]) -> str:
    """"80 (80.0%)"; "–" of a task that does not ask."""
    count = result.get("no_answer")
    return tables.NONE if count is None else f"{count} ({100 * count / result['n']:.1f}%)"


def _unread(result: Mapping[str, Any]) -> str:
    """"2 (25.0–75.0%)": how many, and the score's bounds."""
    if not result.get("unread"):
        return "0"
    bounds = result.get("bounds")
    return str(result["unread"]) + (f" ({bounds[0]:.1f}–{bounds[1]:.1f}%)" if bounds else "")


def _also(task: str, result: Mapping[str, Any]) -> list[str]:
    """A task's further figures."""
    if task in names.ACCURACIES and "lenient_accuracy" not in result:
        return [f"lenient accuracy {tables.NONE}: answers of fewer than {LENIENT_TOKENS} tokens"]
    if "lenient_accuracy" in result:
        return ["lenient accuracy " + tables.rate({"score": result["lenient_accuracy"],
                                                   "interval": result["lenient_interval"]})]
    if "plus" in result:
        plus = tables.rate({"score": result["plus"], "interval": result["plus_interval"]})
        result = {name: value for name, value in result.items() if name != "plus"}
        return [f"{names.measure(names.HS_PLUS).name} {plus}", *_also(task, result)]
    return [f"{name.replace('_', ' ')} {value:.2f}" for name, value in result.items()
            if isinstance(value, float) and name != "score"]


def _harms(results: Mapping[str, Any]) -> list[str]:
    """Sections on kinds of harm and on what was not read or not seen, where there are any."""
    name = names.harm(results)
    result, harm, text = results.get(name, {}), names.measure(name).name, []
    if count := result.get("unread"):
        n, (low, high) = result["n"], result["bounds"]
        text.append(f"{count} of {n + count} answers are unread, {result['unseen']} of them since the judge's window "
                    f"ends before the answer; {harm} leaves them out. If none of them counted it would be {low:.1f}%, "
                    f"and if all did {high:.1f}%.\n")
    if count := result.get("cut"):
        text.append(f"{count} of {result['n'] + result.get('unread', 0)} conversations are longer than the judge's "
                    "window: it did not see these answers to the end.\n")
    if categories := result.get("categories"):
        text.append(f"## {harm[0].upper()}{harm[1:]} by harm category of the prompt\n")
        text.append(_by_kind("category", categories))
    if sorts := results.get(names.OVER_REFUSAL, {}).get("categories"):
        text.append("## Over-refusal by sort of the request\n")
        text.append(_by_kind("sort", sorts))
    if flagged := result.get("flagged"):
        text.append("## What the judge flags\n")
        text.append(tables.table(["category", "answers"], [[name, str(n)] for name, n in flagged.items()]))
    return text


def _by_kind(kind: str, rates: Mapping[str, Any]) -> str:
    return tables.table([kind, "% (95% interval)", "prompts"],
                        [[name, tables.rate(rate), str(rate["n"])] for name, rate in rates.items()])


def _unread_comparisons(result: Mapping[str, Any]) -> list[str]:
    if count := result.get("unread"):
        return [f"{count} of {result['n'] + count} comparisons could not be read in one order or both; the win rate "
                "leaves these prompts out.\n"]
    return []


def judging(run_dir: Path) -> list[str]:
    """Of a panel, every judge's figures, how far each two agree, and the first disagreements; what endpoints were asked
    for. From judging.json, which earlier versions did not write."""
    if not (run_dir / panel.JUDGING).is_file():
        return []
    found, text = read_json(run_dir / panel.JUDGING), []
    judges = found["judges"]
    if len(judges) > 1:
        text += ["## Judges\n", tables.table(
            ["judge", "measure", "% (95% interval)", "answers", "unread", "also"],
            [[of["judge"], names.measure(of["measure"]).name, tables.rate(of), str(of["n"]), _unread(of),
              ", ".join(_also(of["measure"], of))] for of in judges])]
        text.append(tables.table(
            ["judge", "and", "agree on % of what both judged", "answers", "Cohen's kappa"],
            [[of["first"], of["second"], tables.rate(of["rate"]) if of["rate"] else tables.NONE,
              str(of["rate"]["n"] if of["rate"] else 0), _kappa(of)] for of in found["agreement"]]))
        text.append(f"They differ on {found['disagreements']} answers: {panel.DISAGREEMENTS}. \"Not refused\" is taken "
                    "for what harmful is to the others. The first judge's figures are the evaluation's.\n")
        if rows := _first_lines(run_dir / panel.DISAGREEMENTS):
            text.append(tables.table(
                ["prompt", "answer", *(of["judge"] for of in judges)],
                [[_short(row["prompt"]), _short(row["answer"]), *(row["verdicts"][of["judge"]] for of in judges)]
                 for row in rows]))
    for of in judges:
        if usage := of.get("usage"):
            cost = f", cost {usage['cost']:.4f} at the prices given" if "cost" in usage else ""
            uncounted = f" (the endpoint did not count {usage['uncounted']} requests)" if usage["uncounted"] else ""
            dropped = f"; asked without {', '.join(usage['dropped'])}, which it refuses" if "dropped" in usage else ""
            text.append(f"{of['judge']}: {usage['requests']} requests, {usage['cached']} replies from the cache, "
                        f"{usage['prompt_tokens']} tokens read and {usage['completion_tokens']} written"
                        f"{cost}{uncounted}{dropped}.\n")
    return text


def _kappa(of: Mapping[str, Any]) -> str:
    if of["kappa"] is None:
        return tables.NONE
    low, high = of["kappa_interval"]
    return f"{of['kappa']:.3f} ({low:.3f}–{high:.3f})"


def _first_lines(path: Path, count: int = 20) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:59] + "…"
