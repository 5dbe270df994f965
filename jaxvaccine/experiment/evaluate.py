"""The evaluation stage: harmful score, fine-tune accuracy, over-refusal and the loss on harmful answers of a model."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxvaccine import data
from jaxvaccine.evaluation import (
    ALPACA_EVAL,
    Sampling,
    answer_prompts,
    mean_loss,
    score_alpaca_eval,
    score_answers,
    write_predictions,
)
from jaxvaccine.evaluation.agents import CONVERSATIONS, HARMFUL_CALLS, TASK_SUCCESS
from jaxvaccine.evaluation.conversations import longest_context
from jaxvaccine.evaluation.tasks import HARMFUL_SCORE, LENIENT_TOKENS, OVER_REFUSAL
from jaxvaccine.experiment import chain, inputs, memory, runs, stage
from jaxvaccine.experiment.align import Examples
from jaxvaccine.experiment.answer_log import answer_log, read_answers
from jaxvaccine.experiment.config import FieldError, Part, field, flat, names, require
from jaxvaccine.experiment.given_answers import judge_given
from jaxvaccine.experiment.judged import RESULTS, give_way
from jaxvaccine.experiment.judging import (
    AUTO,
    MODELS,
    NEEDS,
    JudgePart,
    check_prompts,
    compares,
    judge_record,
    make_comparer,
    make_judge,
    probe,
    resolve,
)
from jaxvaccine.experiment.panel import judge_harm
from jaxvaccine.experiment.parts import (
    AS_ALIGNED,
    BAD_ROWS,
    SOURCE,
    AfterAlignment,
    Dtype,
    LaterPrompt,
    LaterProtocol,
    RunPart,
    check_form,
    check_prefill,
    check_sources,
)
from jaxvaccine.experiment.seen import shared_of_tests, trained_on, trained_sets
from jaxvaccine.experiment.summary import summary
from jaxvaccine.json_files import read_json, write_json
from jaxvaccine.quantisation import Kind

MEAN_LOSS = "mean_loss.json"
DEFAULT_ROWS = 32  # decoded together where nobody knows better
LOSS = "harmful_loss"  # beside the tasks in the results: h(w), no rate


class Test(NamedTuple):
    """What a field with test data measures, and which field has its longest answer."""

    task: str  # key of evaluation.TASKS, or ALPACA_EVAL
    length: str = "max_new_tokens"


# By the name of the field with the data.
TESTS = {
    "harmful_test": Test(HARMFUL_SCORE), "sst2_test": Test("sst2", "label_max_new_tokens"),
    "agnews_test": Test("agnews", "label_max_new_tokens"), "gsm8k_test": Test("gsm8k", "solution_max_new_tokens"),
    "benign_test": Test(OVER_REFUSAL), "alpaca_eval_test": Test(ALPACA_EVAL, "instruction_max_new_tokens"),
    "agents_harmful_test": Test(HARMFUL_CALLS), "agents_tasks_test": Test(TASK_SUCCESS)}


@dataclasses.dataclass(frozen=True)
class EvaluatedModel(Part):
    """Model."""

    model: str = field("", "Model: a Hugging Face directory, a hub id or a .gguf file; --trained has its own.")
    revision: str = field("", "Branch, tag or commit of --model on the hub; its main branch unless given.")
    trained: str = field("", "Folder of a finished alignment or attack to score; none scores --model itself.")
    answers: str = field(
        "", "Answers to judge in the place of a model: the folder of an earlier evaluation, or a JSONL file with "
        "prompt, answer and perhaps category.")
    quantisation: Kind = field("none", "In what --model's frozen matrices are kept; --trained has its own.")
    dtype: Dtype = field("checkpoint", "Type of the computation. checkpoint reads float16 files as bfloat16.")
    merge_adapter: bool = field(
        False, "Merge the run's adapter into the weights: faster, and rounded to their type.")

    def __post_init__(self):
        super().__post_init__()
        require(sum(map(bool, (self.model, self.trained, self.answers))) == 1, "model", self.model,
                "either --model or --trained, or --answers")
        require(self.quantisation == "none" or not self.merge_adapter, "merge_adapter", self.merge_adapter,
                f"False: no adapter is merged into {self.quantisation} weights")

    def resolve(self, run: Mapping[str, Any], name: str) -> "EvaluatedModel":
        """The part with the quantisation of the run that `name` names, given its config.json.

        Raises:
          FieldError: another is asked for, or that the adapter be merged into what is quantised.
        """
        found = runs.flag(run, "quantisation")
        require(self.quantisation in ("none", found), "quantisation", self.quantisation,
                f"{found}, with which {name} was trained")
        return dataclasses.replace(self, quantisation=found)


@dataclasses.dataclass(frozen=True)
class TestsPart(AfterAlignment, Part):
    """Data."""

    harmful_test: str = field("", f"Harmful prompts for HS: {SOURCE}; none leaves HS out.")
    sst2_test: str = field("", "SST-2 data for FA; none leaves FA out.")
    agnews_test: str = field("", "AG News data for FA; none leaves it out.")
    gsm8k_test: str = field("", "GSM8K data for FA; none leaves it out.")
    benign_test: str = field("", "Harmless requests for over-refusal; none leaves it out.")
    alpaca_eval_test: str = field(
        "", "AlpacaEval's instructions with a reference model's outputs, for the win rate; needs --judge=chat_api.")
    agents_harmful_test: str = field(
        "", "Requests for forbidden calls, for the harmful-call rate of a model with tools; none leaves it out.")
    agents_tasks_test: str = field(
        "", "Requests that tools are to be called for, for task success; none leaves it out.")
    loss_data: str = field("", "Harmful examples whose mean loss h(w) is taken; none leaves it out.")
    max_length: int = field(256, "Tokens at which prompt and answer of --loss_data are cut.", at_least=1)
    prompt: LaterPrompt = field(
        AS_ALIGNED, "What is put around a test's examples: the prompt that --trained was aligned with, and another is "
        "an error; of --model alpaca, the papers', unless given.")
    system_prompt: str | None = field(
        None, "--prompt=chat: the system prompt of conversations that have none; that of --trained unless given, and "
        "'' is what the template does itself.")
    supervise: data.Supervise = field(
        "all", "--prompt=chat: of conversations of --loss_data with several answers, which ones count.")
    bad_rows: data.BadRows = field("error", BAD_ROWS)
    data_protocol: LaterProtocol = field(
        AS_ALIGNED, "That of --trained unless given, of --model distinct: every prompt once, and no harmful one that "
        "the model was trained on; or rows as they are.")

    def __post_init__(self):
        super().__post_init__()
        check_sources(self, *TESTS, "loss_data")

    @property
    def forbidden(self) -> str:
        """The sources of all harmful prompts, which no attack may train on; "" without any."""
        return ",".join(filter(None, (self.harmful_test, self.agents_harmful_test)))

    @property
    def given(self) -> tuple[str, ...]:
        """The fields with data that are measured."""
        return tuple(name for name in (*TESTS, "loss_data") if getattr(self, name))

    def load(self) -> Examples:
        """{task: examples}, the loss first."""
        named = ({LOSS: self.loss_data} if self.loss_data else {}) | {
            test.task: getattr(self, name) for name, test in TESTS.items() if getattr(self, name)}
        return {task: data.load_examples(source, self.protocol, self.bad_rows)
                for task, source in named.items()}


@dataclasses.dataclass(frozen=True)
class GenerationPart(Part):
    """Evaluation."""

    max_new_tokens: int = field(
        200, "Longest answer to a request, or turn of a model with tools, in tokens.", at_least=1)
    label_max_new_tokens: int = field(
        LENIENT_TOKENS, "Longest answer on SST-2 and AG News, in tokens. 8 are enough to see that it is more than a "
        f"label; with fewer than {LENIENT_TOKENS} there is no lenient accuracy.", at_least=1)
    solution_max_new_tokens: int = field(200, "Longest answer on GSM8K, in tokens.", at_least=1)
    instruction_max_new_tokens: int = field(512, "Longest answer on AlpacaEval, in tokens.", at_least=1)
    label_rule: Literal["equals", "contains"] = field(
        "equals", "What is right on SST-2 and AG News: an answer that equals the label, Booster's rule; or one that "
        "contains it, T-Vaccine's.")
    temperature: float = field(0.0, "0 takes the most likely token; above, tokens are drawn.")
    top_k: int = field(0, "Draws are from this many most likely tokens; 0 takes all.")
    top_p: float = field(1.0, "Draws are from the fewest most likely tokens with this probability together.")
    prefill: str | None = field(
        None, "What answers to harmful prompts are made to begin with, as 'Sure, here is'; the judge reads it with the "
        "rest. That of --trained's attack unless given.")
    stop: tuple[str, ...] = field(
        (), "Texts at which an answer ends, before them, beside the model's own tokens for that.")
    eval_batch_size: int | None = field(
        None, f"Rows decoded together; unless given {DEFAULT_ROWS}, on a GPU as many as its memory has room for. On a "
        "CPU, 256 keep all cores busy.", at_least=1)
    eval_bucket: int = field(32, "Prompts are padded to a multiple of this many tokens.", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        self.sampling(0)
        require(all(self.stop), "stop", self.stop, "texts that are not empty")

    @property
    def rows(self) -> int:
        """Rows that are computed together, whatever the device."""
        return self.eval_batch_size or DEFAULT_ROWS

    def longest(self, task: str) -> int:
        """The longest answer of a task, in tokens."""
        return getattr(self, next(test.length for test in TESTS.values() if test.task == task))

    def begins(self, task: str) -> str:
        """What all answers of a task begin with."""
        return (self.prefill or "") if task == HARMFUL_SCORE else ""

    def sampling(self, seed: int) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, seed)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """All that an evaluation depends on."""

    model: EvaluatedModel
    tests: TestsPart
    generation: GenerationPart = GenerationPart()
    judge: JudgePart = JudgePart()
    run: RunPart = RunPart(run_dir="-")

    def __post_init__(self):
        if self.model.answers:
            require(not self.tests.given, *((self.tests.given[0], getattr(self.tests, self.tests.given[0]))
                                            if self.tests.given else ("", "")), "none beside --answers")
            require(self.judge.judge != AUTO, "judge", self.judge.judge, f"who judges --answers: {NEEDS}")
        else:
            require(set(self.tests.given) - {"loss_data"} != set(), "harmful_test", self.tests.harmful_test,
                    "at least one of " + ", ".join(f"--{name}" for name in TESTS))
        # Stop strings end no turn of a model with tools.
        with_tools = [name for name in self.tests.given if name in TESTS and TESTS[name].task in CONVERSATIONS]
        require(not (self.generation.stop and with_tools), "stop", self.generation.stop,
                "none beside " + " and ".join(f"--{name}" for name in with_tools))
        object.__setattr__(self, "judge", resolve(self.judge, self.tests.harmful_test))
        require(compares(self.judge) is not None or not self.tests.alpaca_eval_test, "judge", self.judge.judge,
                "chat_api, which --alpaca_eval_test needs")


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
            categories = data.load_categories(config.tests.harmful_test, config.tests.bad_rows)
            judged = judge_harm(config.judge, rows, answers[task], categories, config.run.progress, make_judge)
            judged.write(run_dir)
            scored = judged.first
        elif task == ALPACA_EVAL:
            scored = score_alpaca_eval(rows, answers[task], make_comparer(config.judge, config.run.progress))
        else:
            scored = score_answers(task, rows, answers[task], categories=_sorts(config.tests, task),
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


def _with_sorts(tests: TestsPart) -> list[data.DataSource]:
    """The sources of harmless requests that say of what sort each is."""
    found = data.parse_sources(tests.benign_test) if tests.benign_test else ()
    return [source for source in found if source.kind in data.SORTS]


def _sorts(tests: TestsPart, task: str) -> Mapping[str, tuple[str, ...]]:
    """Sorts of harmless requests, by the prompt's fingerprint."""
    return data.load_categories(_with_sorts(tests), tests.bad_rows) if task == OVER_REFUSAL else {}


def _categories_hash(tests: TestsPart) -> str:
    """Of the kinds of harm that scores are told apart by, where they are read from a file."""
    sources = data.parse_sources(tests.harmful_test) if tests.harmful_test else ()
    found = data.load_categories([*(source for source in sources if source.path), *_with_sorts(tests)], tests.bad_rows)
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
