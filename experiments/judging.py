"""The flags that choose a judge, and the judge that they choose."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from experiments import common
from experiments.config_flags import flag
from jaxvaccine.checkpoints import files
from jaxvaccine.evaluation import keyword_judge
from jaxvaccine.evaluation.beaver_dam import MODEL, load_beaver_dam
from jaxvaccine.evaluation.chat_api import Endpoint, chat_judge, key_from_environment
from jaxvaccine.evaluation.judges import Judge
from jaxvaccine.evaluation.pairwise import Comparer, chat_comparer
from jaxvaccine.evaluation.rubrics import RUBRICS


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Flags of every script that judges answers."""

    judge: Literal["keyword", "beaver_dam", "chat_api"] = flag(
        "keyword", "Which answers are unsafe: those without a refusal phrase, those that beaver-dam flags, or those to "
        "which a chat model gives --judge_threshold or more.")
    judge_model: str = flag("", "Model of the judge: for beaver_dam a Hugging Face directory or hub id "
                                f"({MODEL} unless given), for chat_api a name at the endpoint.")
    judge_dtype: Literal["checkpoint", "float32", "bfloat16", "float16"] = flag(
        "checkpoint", "Type of beaver_dam's weights and computation.")
    judge_max_length: int = flag(256, "Tokens at which beaver_dam cuts prompt and answer; the papers' is 256.")
    judge_batch_size: int = flag(16, "Answers that beaver_dam judges together.")
    judge_url: str = flag("https://api.openai.com/v1", "chat_api: base URL of an OpenAI-compatible API.")
    judge_key_variable: str = flag("OPENAI_API_KEY", "chat_api: environment variable with the API key.")
    judge_rubric: Literal["harmfulness", "strongreject"] = flag(
        "harmfulness", "chat_api: 1 to 5 after Qi et al. 2023, or 0 to 1 after StrongREJECT.")
    judge_threshold: float | None = flag(
        None, "chat_api: from this score on an answer is unsafe; harmfulness 5, strongreject 0.5 unless given.")
    judge_options: str = flag('{"temperature": 0}', "chat_api: further fields of a request, a JSON object.")
    judge_timeout: float = flag(60.0, "chat_api: seconds after which an attempt has failed.")
    judge_attempts: int = flag(6, "chat_api: attempts at a request.")
    judge_workers: int = flag(8, "chat_api: requests under way at once.")
    judge_cache: str = flag("", "chat_api: folder of replies; judge/ in jaxvaccine's cache unless given.")
    progress: bool = flag(True, "Draw progress bars.")

    def __post_init__(self):
        for name in ("judge_max_length", "judge_batch_size", "judge_attempts", "judge_workers"):
            common.require(self, name, getattr(self, name) >= 1, "at least 1")
        common.require(self, "judge_timeout", self.judge_timeout > 0, "more than 0")
        common.require(self, "judge_options", isinstance(_options(self.judge_options), dict), "a JSON object")
        common.require(self, "judge_model", bool(self.judge_model) or self.judge != "chat_api",
                       "a model's name, which --judge=chat_api needs")
        if self.judge == "chat_api":
            _endpoint(self)


def _options(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _endpoint(config: JudgeConfig) -> Endpoint:
    endpoint = Endpoint(
        config.judge_url, config.judge_model, options=_options(config.judge_options), timeout=config.judge_timeout,
        attempts=config.judge_attempts, workers=config.judge_workers,
        cache=Path(config.judge_cache) if config.judge_cache else files.cache_directory() / "judge")
    return dataclasses.replace(endpoint, key=key_from_environment(config.judge_url, config.judge_key_variable))


def make_judge(config: JudgeConfig) -> Judge:
    """The judge of the flags; a judge that is a model is loaded now, so what it needs the room of has to be gone."""
    if config.judge == "beaver_dam":
        return load_beaver_dam(
            config.judge_model or MODEL, dtype=None if config.judge_dtype == "checkpoint" else config.judge_dtype,
            max_length=config.judge_max_length, batch_size=config.judge_batch_size, progress=config.progress)
    if config.judge == "chat_api":
        rubric = RUBRICS[config.judge_rubric]
        if config.judge_threshold is not None:
            rubric = rubric._replace(threshold=config.judge_threshold)
        return chat_judge(_endpoint(config), rubric, progress=config.progress)
    return keyword_judge


def make_comparer(config: JudgeConfig) -> Comparer:
    """The chat model of the flags, as a judge between two answers."""
    return chat_comparer(_endpoint(config), progress=config.progress)
