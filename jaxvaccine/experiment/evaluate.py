"""The evaluation stage: harmful score, fine-tune accuracy, over-refusal and the loss on harmful answers of a model."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxvaccine import data
from jaxvaccine.evaluation import (
    ALPACA_EVAL,
    answer_prompts,
    mean_loss,
    score_alpaca_eval,
    score_answers,
    write_predictions,
)
from jaxvaccine.evaluation.agents import CONVERSATIONS, HARMFUL_CALLS
from jaxvaccine.evaluation.conversations import longest_context
from jaxvaccine.evaluation.tasks import HARMFUL_SCORE, LENIENT_TOKENS
from jaxvaccine.experiment import chain, inputs, memory, runs, stage
from jaxvaccine.experiment.align import Examples
from jaxvaccine.experiment.answer_log import answer_log, read_answers
from jaxvaccine.experiment.config import FieldError, flat, names
from jaxvaccine.experiment.evaluate_config import DEFAULT_ROWS, LOSS, EvaluateConfig, TestsPart
from jaxvaccine.experiment.given_answers import judge_given
from jaxvaccine.experiment.judged import RESULTS, give_way
from jaxvaccine.experiment.judging import (
    MODELS,
    JudgePart,
    check_prompts,
    judge_record,
    make_comparer,
    make_judge,
    probe,
)
from jaxvaccine.experiment.panel import judge_harm
from jaxvaccine.experiment.parts import check_form, check_prefill
from jaxvaccine.experiment.seen import shared_of_tests, trained_on, trained_sets
from jaxvaccine.experiment.summary import summary
from jaxvaccine.json_files import read_json, write_json

MEAN_LOSS = "mean_loss.json"


class Prepared(NamedTuple):
    """An evaluation before anything is computed."""

    config: EvaluateConfig  # with nothing left open
    run_dir: Path
    model: str
    revision: str
    examples: Examples
    judged_by: dict[str, Any]
    dtype: str  # of the weights


def prepare(config: EvaluateConfig, write: bool = True) -> Prepared:
    """Reads and checks all that the evaluation needs but the weights, and opens its folder; errors as of `evaluate`.

    write: as of `runs.open_run`.
    """
    model_path, revision, seen, sets = config.model.model, config.model.revision, {}, {}
    made_of: dict[str, Any] = {}
    below: dict[str, Any] = {}
    if trained := config.model.trained:
        model_path, revision, seen = trained_on(trained)
        sets = trained_sets(trained)
        made_of["trained"] = inputs.of_run(trained)
        below = chain.record(chain.links(trained))
        run, generation = runs.read_config(trained), config.generation
        if generation.prefill is None:
            generation = dataclasses.replace(generation, prefill=runs.flag(run, "prefill"))
        config = dataclasses.replace(config, tests=config.tests.resolve(run["flags"], trained), generation=generation,
                                     model=config.model.resolve(run, trained))
    examples = config.tests.load()
    check_unseen(examples, seen, config.tests.protocol)
    check_prompts(config.judge, examples.get(HARMFUL_SCORE, ()))
    tokenizer = stage.load_tokenizer(model_path, revision)
    template = check_form(tokenizer, config.tests.form)
    accounts = stage.tell(accounts_of_tests(tokenizer, examples, config.tests))
    check_prefill(tokenizer, config.generation.prefill, config.tests.form)
    shared = stage.tell_shared(shared_of_tests(examples, sets))
    judged_by = judge_record(config.judge)
    dtype = stage.loaded_dtype(model_path, config.model.dtype, revision)
    run_dir = stage.open_run(
        config, config.run, "evaluate", examples, {"model": inputs.of_model(model_path, revision), **made_of},
        {"accounts": accounts, "shared": shared, "categories": _categories_hash(config.tests), "dtype": dtype,
         **template, **below},
        changeable=names(JudgePart) | {"eval_batch_size"}, write=write)
    return Prepared(config, run_dir, model_path, revision, examples, judged_by, dtype)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Carries out the evaluation, or reads the results of a finished one.

    {measure: {score, interval, n, …}}, with loss data also {LOSS: {loss, tokens, n}}, the loss in nats a token. The
    measure is the task, but PHRASES_SCORE in the place of HARMFUL_SCORE where the judge is one of phrases.

    Raises:
      FieldError, ValueError, FileNotFoundError: bad input, before anything is written.
      FileExistsError: the folder holds another evaluation.
    """
    if config.model.answers:
        return judge_given(config.model.answers, config.judge, config.run, flat(config))
    config, run_dir, model_path, revision, examples, judged_by, _ = prepare(config)
    give_way(run_dir, judged_by)
    if (run_dir / RESULTS).exists():
        return read_json(run_dir / RESULTS)
    answers = _measure(config, run_dir, model_path, revision, examples)
    if any(member.judge in MODELS for member in config.judge.panel()):
        # There is not room for two 7B models.
        stage.forget_backbone()
    results: dict[str, Any] = {}
    for task, rows in examples.items():
        if task == LOSS:
            results[task] = answers[task]
            continue
        if task == HARMFUL_SCORE:
            judged = judge_harm(config.judge, rows, answers[task], config.tests.categories(task), config.run.progress,
                                make_judge)
            judged.write(run_dir)
            scored = judged.first
        elif task == ALPACA_EVAL:
            scored = score_alpaca_eval(rows, answers[task], make_comparer(config.judge, config.run.progress))
        else:
            scored = score_answers(task, rows, answers[task], categories=config.tests.categories(task),
                                   whole=config.generation.longest(task) >= LENIENT_TOKENS,
                                   label_rule=config.generation.label_rule)
        write_predictions(run_dir / f"predictions_{task}.jsonl", scored.predictions, overwrite=True)
        results[scored.name] = summary(scored)
    write_json(run_dir / RESULTS, results)
    return results


def _measure(config: EvaluateConfig, run_dir: Path, model_path: str, revision: str, examples: Examples
             ) -> dict[str, Any]:
    """All that needs the model: {task: answers}, and the loss.

    What an interrupted evaluation has generated is read, not repeated.
    """
    paths = {task: run_dir / f"answers_{task}.jsonl" for task in examples if task != LOSS}
    found = {task: read_answers(path) for task, path in paths.items()}
    loss = read_json(run_dir / MEAN_LOSS) if (run_dir / MEAN_LOSS).exists() else None
    if (loss is not None or LOSS not in examples) and all(len(found[task]) == len(examples[task]) for task in found):
        return _in_order(found, loss)
    generation = config.generation
    if {HARMFUL_SCORE, ALPACA_EVAL} & set(examples):
        probe(config.judge, HARMFUL_SCORE in examples)
    tokenizer = stage.load_tokenizer(model_path, revision)
    base = stage.load_base(model_path, config.model.dtype, config.model.trained or None,
                           merge=config.model.merge_adapter, revision=revision,
                           quantisation=config.model.quantisation)
    model = base.model.clone(lora=base.lora)
    if LOSS in examples and loss is None:
        loss = mean_loss(
            model, base.adapter, base.frozen,
            data.tokenize_examples(tokenizer, examples[LOSS], config.tests.max_length, config.tests.form),
            generation.rows, generation.eval_bucket)._asdict()
        write_json(run_dir / MEAN_LOSS, loss)
    for task, path in paths.items():
        longest = [*map(longest_context, examples[task])] if task in CONVERSATIONS else examples[task]
        rows = generation.eval_batch_size or memory.rows_that_fit(
            model, data.encode_prompts(tokenizer, longest, prompt=config.tests.form,
                                       prefill=generation.begins(task)),
            generation.longest(task), generation.eval_bucket) or DEFAULT_ROWS
        with answer_log(path, found[task]) as keep:
            found[task] = dict(enumerate(answer_prompts(
                model, base.adapter, base.frozen, tokenizer, examples[task], task=task,
                max_new_tokens=generation.longest(task), batch_size=rows,
                bucket=generation.eval_bucket, sampling=generation.sampling(config.run.seed),
                progress=config.run.progress, answered=found[task], keep=keep, prompt=config.tests.form,
                prefill=generation.begins(task), stop=generation.stop)))
    return _in_order(found, loss)


def _in_order(found: Mapping[str, Mapping[int, str]], loss: Any) -> dict[str, Any]:
    answers: dict[str, Any] = {task: [answers[i] for i in range(len(answers))] for task, answers in found.items()}
    return answers if loss is None else {LOSS: loss, **answers}


def _categories_hash(tests: TestsPart) -> str:
    """Of the kinds of harm that scores are told apart by, where they are read from a file."""
    sources = data.parse_sources(tests.harmful_test) if tests.harmful_test else ()
    found = data.load_categories([*(source for source in sources if source.path), *tests.with_sorts], tests.bad_rows)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def check_unseen(examples: Mapping[str, Sequence[data.Example]], seen: Mapping[str, Collection[str]],
                 protocol: data.Protocol = "distinct") -> None:
    """Raises FieldError if the harmful test, or what h(w) is taken on, has a prompt that the model was trained on,
    unless rows are taken as they are; of other tests it warns."""
    unseen = {HARMFUL_SCORE: "harmful_test", HARMFUL_CALLS: "agents_harmful_test", LOSS: "loss_data"}
    for task, rows in examples.items():
        for where, prompts in seen.items():
            overlap = {data.fingerprint(row) for row in rows} & set(prompts)
            if overlap and task in unseen and protocol == "distinct":
                raise FieldError(unseen[task], f"found {len(overlap)} of {len(rows)} prompts also in the {where}, "
                                               "expected none")
            if overlap:
                logging.warning("%s: %d of %d test prompts are also in the %s", task, len(overlap), len(rows), where)


def accounts_of_tests(tokenizer, examples: Examples, tests: TestsPart) -> dict[str, tuple[data.Account, ...]]:
    """The accounts of the tests' sources, {task: one each}.

    Raises:
      ValueError: a prompt that is empty, holds the prompt's template or spells a special token; of the data that h(w)
        is taken on, as of `data.training_fates`.
    """
    accounts = {}
    for task, rows in examples.items():
        accounts[task] = data.accounts_of(rows)
        if task == LOSS:
            fates = data.training_fates(tokenizer, rows, tests.max_length, tests.form)
            # Cut as training data is, and not trained on.
            accounts[task] = tuple(of._replace(trained=None) for of in data.tally(accounts[task], rows, fates))
        else:
            data.check_prompts(tokenizer, rows, tests.form)
    return accounts
