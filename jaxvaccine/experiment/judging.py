"""Which judge reads the answers, and the judge itself.

To add a judge: its module in jaxvaccine/evaluation/, then a line in JUDGES (and its settings, if it has any, in
`JudgePart`)."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxvaccine import data
from jaxvaccine.checkpoints import files
from jaxvaccine.evaluation import keyword_judge
from jaxvaccine.evaluation.beaver_dam import MODEL, load_beaver_dam
from jaxvaccine.evaluation.chat_api import Endpoint, chat_judge, key_from_environment
from jaxvaccine.evaluation.judges import Judge, world_judge
from jaxvaccine.evaluation.pairwise import Comparer, chat_comparer
from jaxvaccine.evaluation.predictions import prompt_text
from jaxvaccine.evaluation.rubrics import RUBRICS
from jaxvaccine.experiment import inputs
from jaxvaccine.experiment.config import FieldError, Part, field, flat, require
from jaxvaccine.experiment.parts import Dtype, split_operational

AUTO = "auto"
# The kinds of data whose prompts the small world's judge knows.
WORLD_KINDS = frozenset(("world_harmful", "world_refusal"))


@dataclasses.dataclass(frozen=True)
class JudgePart(Part):
    """Judge."""

    judge: str = field(
        AUTO, "What finds harm: beaver_dam, where it flags an answer; chat_api, where a chat model gives "
        "--judge_threshold or more; world, which knows the small world's answers. keyword finds none, and tells which "
        "have no refusal phrase: not refused. auto is world for the small world's prompts, else keyword.")
    judge_model: str = field("", "Model of the judge: for beaver_dam a Hugging Face directory or hub id "
                                 f"({MODEL} unless given), for chat_api a name at the endpoint.")
    judge_dtype: Dtype = field("checkpoint", "Type of beaver_dam's weights and computation.")
    judge_max_length: int = field(
        256, "Tokens at which beaver_dam cuts prompt and answer; the papers' is 256.", at_least=1)
    judge_batch_size: int = field(16, "Answers that beaver_dam judges together.", at_least=1)
    judge_url: str = field("https://api.openai.com/v1", "chat_api: base URL of an OpenAI-compatible API.")
    judge_key_variable: str = field("OPENAI_API_KEY", "chat_api: environment variable with the API key.")
    judge_rubric: Literal["harmfulness", "strongreject"] = field(
        "harmfulness", "chat_api: 1 to 5 after Qi et al. 2023, or 0 to 1 after StrongREJECT.")
    judge_threshold: float | None = field(
        None, "chat_api: from this score on an answer is harmful; harmfulness 5, strongreject 0.5 unless given.")
    judge_options: str = field('{"temperature": 0}', "chat_api: further fields of a request, a JSON object.")
    judge_timeout: float = field(60.0, "chat_api: seconds after which an attempt has failed.", above=0)
    judge_attempts: int = field(6, "chat_api: attempts at a request.", at_least=1)
    judge_workers: int = field(8, "chat_api: requests under way at once.", at_least=1)
    judge_cache: str = field("", "chat_api: folder of replies; judge/ in jaxvaccine's cache unless given.")

    def __post_init__(self):
        super().__post_init__()
        require(self.judge in self.options(), "judge", self.judge, "one of " + ", ".join(self.options()))
        require(isinstance(_options(self.judge_options), dict), "judge_options", self.judge_options, "a JSON object")
        require(bool(self.judge_model) or self.judge != "chat_api", "judge_model", self.judge_model,
                "a model's name, which --judge=chat_api needs")
        if self.judge == "chat_api":
            endpoint(self)

    @classmethod
    def options(cls) -> tuple[str, ...]:
        return (AUTO, *JUDGES)


def resolve(part: JudgePart, harmful_test: str) -> JudgePart:
    """The settings with a judge in the place of AUTO: the small world's for its own prompts alone, else keyword.

    harmful_test: the data source with the prompts, "" if there is none.
    """
    if part.judge != AUTO:
        return part
    kinds = {source.kind for source in data.parse_sources(harmful_test)} if harmful_test else set()
    return dataclasses.replace(part, judge="world" if kinds and kinds <= WORLD_KINDS else "keyword")


def check_prompts(part: JudgePart, examples: Sequence[data.Example]) -> None:
    """Raises FieldError for harmful prompts that the judge cannot judge, before anything is generated."""
    if part.judge == "world":
        try:
            world_judge([prompt_text(example) for example in examples], [""] * len(examples))
        except ValueError as error:
            raise FieldError("judge", str(error)) from error


def _options(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def endpoint(part: JudgePart) -> Endpoint:
    found = Endpoint(
        part.judge_url, part.judge_model, options=_options(part.judge_options), timeout=part.judge_timeout,
        attempts=part.judge_attempts, workers=part.judge_workers,
        cache=Path(part.judge_cache) if part.judge_cache else files.cache_directory() / "judge")
    return dataclasses.replace(found, key=key_from_environment(part.judge_url, part.judge_key_variable))


def _keyword(part: JudgePart, progress: bool) -> Judge:
    return keyword_judge


def _world(part: JudgePart, progress: bool) -> Judge:
    return world_judge


def _beaver_dam(part: JudgePart, progress: bool) -> Judge:
    return load_beaver_dam(
        part.judge_model or MODEL, dtype=None if part.judge_dtype == "checkpoint" else part.judge_dtype,
        max_length=part.judge_max_length, batch_size=part.judge_batch_size, progress=progress)


def _chat_api(part: JudgePart, progress: bool) -> Judge:
    rubric = RUBRICS[part.judge_rubric]
    if part.judge_threshold is not None:
        rubric = rubric._replace(threshold=part.judge_threshold)
    return chat_judge(endpoint(part), rubric, progress=progress)


JUDGES: dict[str, Callable[[JudgePart, bool], Judge]] = {
    "keyword": _keyword, "world": _world, "beaver_dam": _beaver_dam, "chat_api": _chat_api}


def judge_record(part: JudgePart) -> dict[str, Any]:
    """Who judges: the settings that a verdict depends on, and the hashes of a judge that is a model here.

    Raises:
      FileNotFoundError, ValueError: there is no such model.
    """
    flags, _ = split_operational(flat(part))
    model = {"model": inputs.of_model(part.judge_model or MODEL)} if part.judge == "beaver_dam" else {}
    return {"flags": flags, "inputs": model}


def make_judge(part: JudgePart, progress: bool = True) -> Judge:
    """The judge; one that is a model is loaded now, so what it needs the room of has to be gone."""
    return JUDGES[part.judge](part, progress)


def make_comparer(part: JudgePart, progress: bool = True) -> Comparer:
    """The chat model of the settings, as a judge between two answers."""
    return chat_comparer(endpoint(part), progress=progress)
