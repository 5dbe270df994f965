"""Which judges read the answers, and the judges themselves.

To add a judge: its module in jaxvaccine/evaluation/, then a line in JUDGES (and its settings, if it has any, in
`JudgePart`)."""

import dataclasses
import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from jaxvaccine import data
from jaxvaccine.checkpoints import files
from jaxvaccine.evaluation import causal, keyword_judge, refusal_phrases
from jaxvaccine.evaluation.beaver_dam import MODEL, load_beaver_dam
from jaxvaccine.evaluation.chat_api import Endpoint, chat_judge, key_from_environment
from jaxvaccine.evaluation.chat_api import probe as probe_endpoint
from jaxvaccine.evaluation.judge_prompts import CHAT
from jaxvaccine.evaluation.judges import Judge, world_judge
from jaxvaccine.evaluation.pairwise import Comparer, chat_comparer
from jaxvaccine.evaluation.predictions import prompt_text
from jaxvaccine.evaluation.rubrics import RUBRICS, Rubric
from jaxvaccine.experiment import inputs
from jaxvaccine.experiment.config import FieldError, Part, field, flat, parse, require, settings
from jaxvaccine.experiment.parts import Dtype, split_operational
from jaxvaccine.json_files import decode_utf8

AUTO = "auto"
# The kinds of data whose prompts the small world's judge knows.
WORLD_KINDS = frozenset(("world_harmful", "world_refusal"))


@dataclasses.dataclass(frozen=True)
class JudgePart(Part):
    """Judge."""

    judge: str = field(
        AUTO, "What finds harm: beaver_dam, where it flags an answer; causal, where a language model here that is "
        "asked says so; chat_api, where a chat model elsewhere gives --judge_threshold or more; world, which knows the "
        "small world's answers. keyword finds none, and tells which have no refusal phrase: not refused. Several, as "
        "keyword,chat_api:model=NAME: a panel, the first of which gives the score. auto is world for the small world's "
        "prompts; for others a judge has to be named.")
    judge_model: str = field("", "Model of the judge: for beaver_dam and causal a Hugging Face directory or hub id "
                                 f"(beaver_dam's is {MODEL} unless given), for chat_api a name at the endpoint.")
    judge_dtype: Dtype = field("checkpoint", "Type of beaver_dam's and causal's weights and computation.")
    judge_max_length: int = field(
        256, "Tokens at which beaver_dam cuts prompt and answer; the papers' is 256.", at_least=1)
    judge_batch_size: int = field(16, "Answers that beaver_dam and causal judge together.", at_least=1)
    judge_template: str = field(
        CHAT, "causal: chat, the tokenizer's own chat template; or a file with {prompt} and {answer} in it.")
    judge_guideline: str = field("", "causal: file with the guideline that a chat template such as ShieldGemma's has.")
    judge_reading: Literal["reply", "probability"] = field(
        "reply", "causal: reads what the model writes, or the probability of the word that finds harm against the "
        "other one's, of the first token.")
    judge_reply: Literal["auto", "safe_unsafe", "yes_no", "score", "harmful_response"] = field(
        "auto", "causal: form of a reply: safe or unsafe; Yes, it does harm, or No; 1 to 5; a line 'Harmful response: "
        "yes'; auto takes whichever it is.")
    judge_max_new_tokens: int = field(32, "causal: longest reply, in tokens.", at_least=1)
    judge_least_mass: float = field(
        0.5, "causal, of probability: where both words together have less the answer is unread.", at_least=0)
    judge_url: str = field("https://api.openai.com/v1", "chat_api: base URL of an OpenAI-compatible API.")
    judge_key_variable: str = field("OPENAI_API_KEY", "chat_api: environment variable with the API key.")
    judge_rubric: Literal["harmfulness", "strongreject"] = field(
        "harmfulness", "chat_api: 1 to 5 after Qi et al. 2023, or 0 to 1 after StrongREJECT.")
    judge_threshold: float | None = field(
        None, "chat_api, causal: from this score on an answer is harmful; harmfulness 5, strongreject 0.5, a reply of "
        "1 to 5 5, a probability 0.5 unless given.")
    judge_options: str = field('{"temperature": 0}', "chat_api: further fields of a request, a JSON object.")
    judge_timeout: float = field(60.0, "chat_api: seconds after which an attempt has failed.", above=0)
    judge_attempts: int = field(6, "chat_api: attempts at a request.", at_least=1)
    judge_workers: int = field(8, "chat_api: requests under way at once.", at_least=1)
    judge_cache: str = field("", "chat_api: folder of replies; judge/ in jaxvaccine's cache unless given.")
    judge_price_in: float | None = field(
        None, "chat_api: price of a million tokens that it reads; with it the report has the cost.", at_least=0)
    judge_price_out: float | None = field(None, "chat_api: price of a million tokens that it writes.", at_least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.judge in self.options():
            self._check()
        else:
            self.panel()

    def _check(self) -> None:
        """Of a single judge."""
        require(isinstance(_options(self.judge_options), dict), "judge_options", self.judge_options, "a JSON object")
        needs = {"chat_api": "a model's name", "causal": "a Hugging Face directory or hub id"}.get(self.judge)
        require(bool(self.judge_model) or not needs, "judge_model", self.judge_model,
                f"{needs}, which --judge={self.judge} needs")
        if self.judge == "chat_api":
            endpoint(self)

    @classmethod
    def options(cls) -> tuple[str, ...]:
        return (AUTO, *JUDGES)

    def panel(self) -> tuple[Self, ...]:
        """The judges, each a part of its own; of a single judge that alone.

        Raises:
          FieldError: one that does not exist, or twice; settings that it has not; a model that several would share.
        """
        if self.judge in self.options():
            return (self,)
        names_of = "|".join(map(re.escape, self.options()))
        members = [self._member(text) for text in re.split(rf"[,+](?=(?:{names_of})(?:[:,+]|$))", self.judge)]
        asking = [member for member, own in members if member.judge in WITH_MODEL and "model" not in own]
        require(not self.judge_model or len(asking) <= 1, "judge_model", self.judge_model,
                "none where several judges of a panel would have it; give each its own, as causal:model=DIRECTORY")
        found = tuple(member for member, _ in members)
        require(len(set(found)) == len(found), "judge", self.judge, "each judge once, or with other settings")
        require(len(found) == 1 or all(member.judge not in (AUTO, "recorded") for member in found), "judge", self.judge,
                "judges by name")
        return found

    def _member(self, text: str) -> tuple[Self, Mapping[str, str]]:
        """A judge of a panel, "causal:model=DIRECTORY:reading=probability", and what it has of its own."""
        head, *items = re.split(r":(?=\w+=)", text)
        require(head in self.options(), "judge", head, "one of " + ", ".join(self.options()) + ", or several, each "
                "with settings of its own, as chat_api:model=NAME")
        own = dict(item.partition("=")[::2] for item in items)
        known = {f.name for f in dataclasses.fields(self)} - {"judge"}
        for name in own:
            require(f"judge_{name}" in known, "judge", text, f"no setting {name!r}; there are "
                    + ", ".join(sorted(each.removeprefix("judge_") for each in known)))
        values = {}
        for name, value in own.items():
            # A path or an address has a + of its own.
            hint = next(s.hint for s in settings(type(self)) if s.name == f"judge_{name}")
            values[f"judge_{name}"] = value if hint is str else parse(type(self), {f"judge_{name}": value})[
                f"judge_{name}"]
        return dataclasses.replace(self, judge=head, **values), own


# Judges that read --judge_model.
WITH_MODEL = frozenset(("beaver_dam", "causal", "chat_api"))
# Flags that only causal judges read. (Records of others, and of earlier versions, are without them.)
OF_CAUSAL = frozenset(f"judge_{name}" for name in (
    "template", "guideline", "reading", "reply", "max_new_tokens", "least_mass"))
# What an endpoint is probed by.
PROBED = ("judge_model", "judge_url", "judge_key_variable", "judge_options", "judge_rubric", "judge_timeout",
          "judge_attempts")
# Judges whose weights are on this machine.
MODELS = frozenset(("beaver_dam", "causal"))
NEEDS = (
    f"beaver_dam, the papers' (weights: --judge_model={MODEL}); causal (weights of a model that judges, such as Llama "
    "Guard, by --judge_model); chat_api (--judge_model and --judge_url of an OpenAI-compatible API, its key in "
    "OPENAI_API_KEY); keyword (nothing, and measures \"not refused\", not harm); world (nothing, for the small world's "
    "prompts alone)")


def resolve(part: JudgePart, harmful_test: str) -> JudgePart:
    """The settings with a judge in the place of AUTO: the small world's, for its own prompts.

    harmful_test: the data source with the prompts, "" if there is none: then no judge is asked.

    Raises:
      FieldError: other prompts, and no judge.
    """
    if part.judge != AUTO:
        return part
    kinds = {source.kind for source in data.parse_sources(harmful_test)} if harmful_test else set()
    if kinds and not kinds <= WORLD_KINDS:
        raise FieldError("judge", f"found none, expected who judges harmful answers: {NEEDS}")
    return dataclasses.replace(part, judge="world" if kinds else "keyword")


def check_prompts(part: JudgePart, examples: Sequence[data.Example]) -> None:
    """Raises FieldError for harmful prompts that a judge cannot judge, before anything is generated."""
    if any(member.judge == "world" for member in part.panel()):
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
        part.judge_model or MODEL, dtype=_dtype(part), max_length=part.judge_max_length,
        batch_size=part.judge_batch_size, progress=progress)


def _dtype(part: JudgePart) -> str | None:
    return None if part.judge_dtype == "checkpoint" else part.judge_dtype


def _question(part: JudgePart) -> dict[str, Any]:
    """What a causal judge is asked by, as arguments."""
    if part.judge_guideline and not Path(part.judge_guideline).is_file():
        raise FileNotFoundError(f"{part.judge_guideline}: found no such file, expected a guideline")
    guideline = ""
    if path := part.judge_guideline:
        guideline = decode_utf8(Path(path).read_bytes(), path).strip()
        require(bool(guideline), "judge_guideline", path, "a file with a guideline in it")
    return {"template": part.judge_template, "reading": part.judge_reading, "form": part.judge_reply,
            "variables": {"guideline": guideline} if guideline else {}}


def _causal(part: JudgePart, progress: bool) -> Judge:
    return causal.load_causal_judge(
        part.judge_model, threshold=part.judge_threshold, max_new_tokens=part.judge_max_new_tokens,
        least_mass=part.judge_least_mass, dtype=_dtype(part), batch_size=part.judge_batch_size, progress=progress,
        **_question(part))


def _rubric(part: JudgePart) -> Rubric:
    rubric = RUBRICS[part.judge_rubric]
    return rubric if part.judge_threshold is None else rubric._replace(threshold=part.judge_threshold)


def _chat_api(part: JudgePart, progress: bool) -> Judge:
    return chat_judge(endpoint(part), _rubric(part), progress=progress)


JUDGES: dict[str, Callable[[JudgePart, bool], Judge]] = {
    "keyword": _keyword, "world": _world, "beaver_dam": _beaver_dam, "causal": _causal, "chat_api": _chat_api}


def settings_of(part: JudgePart) -> dict[str, Any]:
    """The flat settings that a verdict depends on: those of causal judges alone where there is one."""
    found, _ = split_operational(flat(part))
    causal_too = any(member.judge == "causal" for member in part.panel())
    return {name: value for name, value in found.items() if causal_too or name not in OF_CAUSAL}


def judge_record(part: JudgePart) -> dict[str, Any]:
    """Who judges: the settings that a verdict depends on, the hashes of judges that are models here, and what judges
    of phrases and chat models go by.

    Raises:
      FileNotFoundError, ValueError: there is no such model, or it cannot be asked so.
    """
    flags, members = settings_of(part), part.panel()
    made_of = [_made_of(member) for member in members]
    if len(members) == 1:
        return {"flags": flags, "inputs": made_of[0]}
    return {"flags": flags, "inputs": dict(zip(labels(members), made_of, strict=True))}


def _made_of(part: JudgePart) -> dict[str, Any]:
    if part.judge == "beaver_dam":
        return {"model": inputs.of_model(part.judge_model or MODEL)}
    if part.judge == "keyword":
        return {"phrases": refusal_phrases.identity()}
    if part.judge == "chat_api":
        return {"rubric": RUBRICS[part.judge_rubric].identity}
    if part.judge == "causal":
        question = causal.prepare(part.judge_model, **_question(part))
        asked = question.render("<prompt>", "<answer>")
        return {"model": inputs.of_model(part.judge_model), "asked": hashlib.sha256(asked.encode()).hexdigest()}
    return {}


def labels(members: Sequence[JudgePart]) -> list[str]:
    """What the judges of a panel are called: "keyword", "chat_api (gpt-4)"; no two alike."""
    found: list[str] = []
    for member in members:
        model = Path(member.judge_model).name if member.judge in WITH_MODEL and member.judge_model else ""
        name = f"{member.judge} ({model})" if model else member.judge
        alike = sum(each == name or each.startswith(f"{name} #") for each in found)
        found.append(f"{name} #{alike + 1}" if alike else name)
    return found


def probe(part: JudgePart, harm: bool = True) -> None:
    """Asks every chat model of the panel about a harmless answer, once a process, so that a wrong key, name or address
    ends a run before it generates anything.

    harm: it will be asked about harm, so that it is told where a reply has no verdict on that.

    Raises:
      FieldError: it does not take the request.
      ConnectionError: nobody answers.
    """
    for member in part.panel():
        unread = _probe(JudgePart(member.judge, **{name: getattr(member, name) for name in PROBED})
                        ) if member.judge == "chat_api" else None
        if unread and harm:
            logging.warning("judge %s: no verdict could be read of its reply to a probe: %s", labels([member])[0],
                            unread)


@functools.cache
def _probe(part: JudgePart) -> str | None:
    try:
        return probe_endpoint(endpoint(part), _rubric(part))
    except ValueError as error:
        raise FieldError("judge", f"probe: {str(error).removeprefix('chat_api: ')}") from error


def make_judge(part: JudgePart, progress: bool = True) -> Judge:
    """A single judge; one that is a model is loaded now, so what it needs the room of has to be gone."""
    return JUDGES[part.judge](part, progress)


def compares(part: JudgePart) -> JudgePart | None:
    """The chat model of the settings, which can compare two answers; None if there is none."""
    return next((member for member in part.panel() if member.judge == "chat_api"), None)


def make_comparer(part: JudgePart, progress: bool = True) -> Comparer:
    """The chat model of the settings, as a judge between two answers."""
    return chat_comparer(endpoint(compares(part) or part), progress=progress)
