"""Scores of models that are trained as lanes: what `evaluate` measures of a run's folder, of every lane."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

from jaxvaccine import data
from jaxvaccine.evaluation import ALPACA_EVAL, evaluate_prompts, mean_loss
from jaxvaccine.experiment import lanes, stage
from jaxvaccine.experiment.evaluate import accounts_of_tests
from jaxvaccine.experiment.evaluate_config import LOSS, TESTS, EvaluateConfig
from jaxvaccine.experiment.judging import make_judge
from jaxvaccine.experiment.seen import ATTACKS, sets_of, shared_of_tests
from jaxvaccine.experiment.summary import summary

# Prompts of every test whose answers are kept.
SHOWN = 2


class Scorer:
    """Scores lanes on the tests of an evaluation's config."""

    def __init__(self, config: EvaluateConfig, tokenizer: Any):
        self.config, self.tokenizer, self.examples = config, tokenizer, config.tests.load()
        self.judge = make_judge(config.judge, config.run.progress)
        self.categories = {task: config.tests.categories(task) for task in self.examples}
        self.lengths = {test.task: getattr(config.generation, test.length) for test in TESTS.values()
                        if test.task != ALPACA_EVAL}
        self.accounts = stage.tell(accounts_of_tests(tokenizer, self.examples, config.tests))

    def of(self, config: EvaluateConfig) -> Self:
        """The same tests, by a config that differs in the prompt and in what answers begin with."""
        other = copy.copy(self)
        other.config = config
        return other

    def beside(self, record: Mapping[str, Any], aligned: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
        """What a cell's file has of a run's record, and the same of the tests.

        record: as of `stage.training_record`. aligned: of an attack, the prompts that the alignment's record has.
        """
        sets = sets_of(record["prompts"] if aligned is None else aligned) | (
            {} if aligned is None else {ATTACKS: record["prompts"]["user"]})
        return {"accounts": {**record["accounts"], **self.accounts},
                "shared": {**record["shared"], **stage.tell_shared(shared_of_tests(self.examples, sets))}}

    def __call__(self, of: lanes.Lanes, seeds: Sequence[int]
                 ) -> tuple[list[dict[str, Any]], dict[str, list[list[str]]]]:
        """(what `evaluate` returns, of every lane; {task: [prompt, answer] of the first lane's first prompts})."""
        found, answers = [], {}
        generation, tests = self.config.generation, self.config.tests
        for i, seed in enumerate(seeds):
            adapter, frozen = of.lane(i)
            scores: dict[str, Any] = {}
            for task, rows in self.examples.items():
                if task == LOSS:
                    tokenized = data.tokenize_examples(self.tokenizer, rows, tests.max_length, tests.form)
                    scores[task] = mean_loss(of.model, adapter, frozen, tokenized, generation.rows,
                                             generation.eval_bucket)._asdict()
                    continue
                result = evaluate_prompts(
                    of.model, adapter, frozen, self.tokenizer, rows, task=task, judge=self.judge,
                    max_new_tokens=self.lengths[task], batch_size=generation.rows,
                    bucket=generation.eval_bucket, sampling=generation.sampling(seed), prompt=tests.form,
                    label_rule=generation.label_rule, progress=self.config.run.progress,
                    prefill=generation.begins(task), stop=generation.stop,
                    categories=self.categories[task])
                scores[result.name] = summary(result)
                answers.setdefault(task, [[p.prompt, p.answer] for p in result.predictions[:SHOWN]])
            found.append(scores)
        return found, answers
