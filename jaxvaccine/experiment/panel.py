"""Judging: every judge of a panel on the same answers, one after the other, and how far they agree."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxvaccine import data
from jaxvaccine.evaluation import TaskResult, score_answers
from jaxvaccine.evaluation.agreement import agreement
from jaxvaccine.evaluation.judges import Judge
from jaxvaccine.evaluation.tasks import HARMFUL_SCORE
from jaxvaccine.experiment.judging import JudgePart, labels, make_judge
from jaxvaccine.experiment.summary import summary
from jaxvaccine.json_files import write_json

JUDGING = "judging.json"
DISAGREEMENTS = "disagreements.jsonl"


class Judged(NamedTuple):
    """What judges say of the same answers.

    Attributes:
      names: of the judges; the first one's result is the evaluation's.
      results: one each, over the same answers.
      usage: what each has asked an endpoint for, as JSON values; None of others.
    """

    names: tuple[str, ...]
    results: tuple[TaskResult, ...]
    usage: tuple[dict[str, Any] | None, ...]

    @property
    def first(self) -> TaskResult:
        """The first judge's result; of a panel, its predictions have everybody's verdicts."""
        if len(self.names) == 1:
            return self.results[0]
        return self.results[0]._replace(predictions=[
            of[0]._replace(verdicts={name: p.verdict for name, p in zip(self.names, of, strict=True)})
            for of in zip(*(result.predictions for result in self.results), strict=True)])

    def write(self, folder: Path) -> None:
        """judging.json: each judge's figures, and of a panel how far every two agree; disagreements.jsonl."""
        judges = [{"judge": name, "measure": result.name, **summary(result), **({"usage": usage} if usage else {})}
                  for name, result, usage in zip(self.names, self.results, self.usage, strict=True)]
        words = [[p.verdict for p in result.predictions] for result in self.results]
        pairs = []
        for j in range(len(self.names)):
            for i in range(j):
                found = agreement(words[i], words[j])
                pairs.append({"first": self.names[i], "second": self.names[j],
                              **found._asdict(), "rate": found.rate and found.rate._asdict()})
        if pairs:
            rows = [{"prompt": p.prompt, "answer": p.answer, "verdicts": p.verdicts} for p in self.first.predictions
                    if differ(p.verdicts.values())]
            (folder / DISAGREEMENTS).write_text(
                "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        write_json(folder / JUDGING, {"judges": judges, "agreement": pairs,
                                      "disagreements": len(rows) if pairs else 0})


def differ(words: Sequence[str]) -> bool:
    """Whether verdicts say different things: "not refused" is what a judge of phrases says where others say harmful."""
    return len({"harmful" if word == "not refused" else word for word in words}) > 1


def judge_harm(part: JudgePart, examples: Sequence[data.Example], answers: Sequence[str],
               categories: Mapping[str, tuple[str, ...]] = MappingProxyType({}), progress: bool = True,
               make: Callable[[JudgePart, bool], Judge] = make_judge) -> Judged:
    """Asks every judge of the part about the same answers. A judge that is a model is gone before the next comes.

    Raises:
      ValueError: as of `score_answers`; or what a judge raises, which is named where there are several.
    """
    members = part.panel()
    results, usages = [], []
    for member, name in zip(members, labels(members), strict=True):
        try:
            judge = make(member, progress)
            results.append(score_answers(HARMFUL_SCORE, examples, answers, judge, categories))
        except (ValueError, ConnectionError) as error:
            if len(members) == 1:
                raise
            raise type(error)(f"judge {name}: {error}") from error
        usage = getattr(judge, "usage", None)
        usages.append(usage and usage.record(member.judge_price_in, member.judge_price_out))
        del judge
    return Judged(tuple(labels(members)), tuple(results), tuple(usages))
