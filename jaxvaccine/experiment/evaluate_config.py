"""What an evaluation depends on: its config."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxvaccine import data
from jaxvaccine.evaluation import ALPACA_EVAL, Sampling
from jaxvaccine.evaluation.agents import CONVERSATIONS, HARMFUL_CALLS, TASK_SUCCESS
from jaxvaccine.evaluation.tasks import HARMFUL_SCORE, LENIENT_TOKENS, OVER_REFUSAL
from jaxvaccine.experiment import runs
from jaxvaccine.experiment.align import Examples
from jaxvaccine.experiment.config import Part, field, require
from jaxvaccine.experiment.judging import AUTO, NEEDS, JudgePart, compares, resolve
from jaxvaccine.experiment.parts import (
    AS_ALIGNED,
    BAD_ROWS,
    SOURCE,
    SYSTEM_PROMPT,
    AfterAlignment,
    Dtype,
    LaterPrompt,
    LaterProtocol,
    RunPart,
    check_sources,
)
from jaxvaccine.quantisation import Kind

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
        None, f"{SYSTEM_PROMPT}that of --trained unless given, and '' is what the template does itself.")
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

    def categories(self, task: str) -> dict[str, tuple[str, ...]]:
        """Of a task's prompts, by fingerprint: kinds of harm, or sorts of harmless requests where a source has
        them."""
        sources = {HARMFUL_SCORE: data.parse_sources(self.harmful_test) if self.harmful_test else (),
                   OVER_REFUSAL: self.with_sorts}.get(task, ())
        return data.load_categories(sources, self.bad_rows)

    @property
    def with_sorts(self) -> tuple[data.DataSource, ...]:
        """The sources of harmless requests that say of what sort each is."""
        found = data.parse_sources(self.benign_test) if self.benign_test else ()
        return tuple(source for source in found if source.kind in data.SORTS)


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
            for name in self.tests.given:
                require(not getattr(self.tests, name), name, getattr(self.tests, name), "none beside --answers")
            require(self.judge.judge != AUTO, "judge", self.judge.judge, f"who judges --answers: {NEEDS}")
        else:
            require(bool(set(self.tests.given) & set(TESTS)), "harmful_test", self.tests.harmful_test,
                    "at least one of " + ", ".join(f"--{name}" for name in TESTS))
        # Stop strings end no turn of a model with tools.
        with_tools = [name for name in self.tests.given if name in TESTS and TESTS[name].task in CONVERSATIONS]
        require(not (self.generation.stop and with_tools), "stop", self.generation.stop,
                "none beside " + " and ".join(f"--{name}" for name in with_tools))
        object.__setattr__(self, "judge", resolve(self.judge, self.tests.harmful_test))
        require(compares(self.judge) is not None or not self.tests.alpaca_eval_test, "judge", self.judge.judge,
                "chat_api, which --alpaca_eval_test needs")
