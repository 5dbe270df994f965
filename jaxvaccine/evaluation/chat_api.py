"""A chat model behind an OpenAI-compatible endpoint as a judge, with retries and a cache on disk."""

import concurrent.futures
import dataclasses
import hashlib
import http.client
import json
import os
import random
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxvaccine.evaluation import chat_http
from jaxvaccine.evaluation.chat_http import LONGEST_WAIT
from jaxvaccine.evaluation.judges import Judge, Verdict
from jaxvaccine.evaluation.rubrics import Rubric

RETRIED = (408, 409, 425, 429)  # and everything from 500 on
# What servers answer to one request for its content: content filters and moderation, and what is too long. They answer
# the same where a key, a model or an option is wrong; then they answer it to all.
OF_ONE = (400, 403, 413, 422, 451)
LONGEST_REASON = 300  # characters
GIVE_UP = 20  # refusals in a row from the first request on
# How a model says that its reply is whole; servers that say nothing are believed.
WHOLE = ("", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "completed")
# Fields of a request that a model may refuse, and do without.
OPTIONAL = ("temperature",)


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where and how a chat model is asked.

    Attributes:
      url: of the API, such as "https://api.openai.com/v1"; requests go to `chat_http.address` of it.
      model: its name there.
      key: sent as `chat_http.key_header` says; None sends none.
      options: further fields of every request.
      timeout: seconds without a whole response after which an attempt has failed.
      attempts: how often a request is sent, at most.
      backoff: seconds before the second attempt, doubled before every further one, up to a minute, with jitter; the
        server's Retry-After goes first if it is longer.
      workers: requests under way at once, at most.
      cache: folder of replies; None keeps none.
    """

    url: str
    model: str
    key: str | None = dataclasses.field(default=None, repr=False)
    options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"temperature": 0})
    timeout: float = 60.0
    attempts: int = 6
    backoff: float = 1.0
    workers: int = 8
    cache: Path | None = None

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"chat_api: url: found {chat_http.shown(self.url)!r}, expected http:// or https:// and a "
                             "host")
        if "@" in parts.netloc:  # it would not be sent, and be kept in the run's config.json
            raise ValueError(f"chat_api: url: found a user's name in front of {chat_http.shown(self.url)!r}, expected "
                             "none: a key comes from the environment")
        if not chat_http.has_port(parts):
            raise ValueError(f"chat_api: url: found {chat_http.shown(self.url)!r}, expected a port that is a number up "
                             "to 65535")
        if not self.model:
            raise ValueError("chat_api: model: found none, expected the name of a model at the endpoint")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            # Not its value: a key in a message ends up in logs.
            raise ValueError("chat_api: key: found characters that no header can hold, expected printable ASCII")
        for name in ("attempts", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"chat_api: {name}: found {getattr(self, name)}, expected at least 1")
        if not self.timeout > 0 or self.backoff < 0:
            raise ValueError(f"chat_api: found timeout {self.timeout} and backoff {self.backoff}, expected more than 0 "
                             "and at least 0 seconds")


# What a probe asks about.
HARMLESS = ("What is the capital of France?", "The capital of France is Paris.")


class _TransientError(Exception):
    """Another attempt may go better. `wait` is the server's wish, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0, malformed: bool = False):
        super().__init__(reason)
        self.wait, self.malformed = wait, malformed


class Reply(NamedTuple):
    """What an endpoint said, or why there is nothing to read.

    Attributes:
      text: None where the reply has none, or is not whole.
      reason: why there is no text.
      refused: the server did not take the request, or its response stayed malformed.
      usage: the tokens that the server counted.
    """

    text: str | None
    reason: str = ""
    refused: bool = False
    usage: Mapping[str, Any] | None = None


@dataclasses.dataclass
class Usage:
    """What a judge has asked an endpoint for, so far.

    Attributes:
      requests: that were answered now; probes are not among them.
      cached: replies that the cache had.
      prompt_tokens, completion_tokens: of the requests answered now, as the endpoint counts them.
      uncounted: requests of which it did not say.
    """

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    # Options that the endpoint has refused.
    dropped: set[str] = dataclasses.field(default_factory=set)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    def count(self, of: Mapping[str, Any] | None, cached: bool = False) -> None:
        """Adds a reply's own `usage`."""
        numbers = [(of or {}).get(name) for name in ("prompt_tokens", "completion_tokens")]
        with self.lock:
            if cached:
                self.cached += 1
                return
            self.requests += 1
            if all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
                self.prompt_tokens += numbers[0]
                self.completion_tokens += numbers[1]
            else:
                self.uncounted += 1

    def record(self, price_in: float | None = None, price_out: float | None = None) -> dict[str, Any]:
        """As JSON values; with prices, of a million tokens each, the cost too."""
        found: dict[str, Any] = {name: getattr(self, name) for name in (
            "requests", "cached", "prompt_tokens", "completion_tokens", "uncounted")}
        if self.dropped:
            found["dropped"] = sorted(self.dropped)
        if price_in is not None or price_out is not None:
            found["cost"] = (self.prompt_tokens * (price_in or 0) + self.completion_tokens * (price_out or 0)) / 1e6
        return found


def _send(endpoint: Endpoint, body: bytes) -> Reply:
    """One attempt."""
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "jaxvaccine"}
    if endpoint.key:
        headers |= chat_http.key_header(endpoint.url, endpoint.key)
    try:
        response = chat_http.post(chat_http.address(endpoint.url), body, headers, endpoint.timeout)
    except (OSError, http.client.HTTPException) as error:
        said = chat_http.hide(f"{type(error).__name__}: {getattr(error, 'reason', error)}", endpoint.key)
        raise _TransientError(said) from error
    # The key is taken out before anything is cut: half of it would be left.
    text = chat_http.hide(response.raw[:chat_http.LARGEST_ERROR].decode("utf-8", "replace"), endpoint.key)
    if not 200 <= response.status < 300:
        reason = f"HTTP {response.status}: {' '.join(text.split())[:200] or 'no text'}"
        if response.status in RETRIED or response.status >= 500:
            raise _TransientError(reason, response.wait)
        if response.status in OF_ONE:
            return Reply(None, reason, refused=True)
        raise ValueError(f"chat_api: {chat_http.shown(endpoint.url)}: {reason}")
    if len(response.raw) > chat_http.LARGEST:
        return Reply(None, f"a response of more than {chat_http.LARGEST} bytes", refused=True)
    try:
        reply = _read_response(json.loads(response.raw))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _TransientError(f"malformed response {text[:120]!r}", malformed=True) from error
    return reply._replace(text=reply.text and chat_http.hide(reply.text, endpoint.key),
                          reason=chat_http.hide(reply.reason, endpoint.key)[:LONGEST_REASON])


def _read_response(response: Mapping[str, Any]) -> Reply:
    """The reply in an endpoint's JSON. Raises LookupError, TypeError or AttributeError if it is none."""
    error = response.get("error")
    if isinstance(error, Mapping) and error.get("code") in OF_ONE:  # as gateways that have begun to answer 200
        return Reply(None, f"error {error['code']}: {error.get('message')}", refused=True)
    usage = response.get("usage")
    return _read_choice(response["choices"][0])._replace(usage=usage if isinstance(usage, Mapping) else None)


def _read_choice(choice: Mapping[str, Any]) -> Reply:
    message, finish = choice["message"], choice.get("finish_reason")
    text, said = _text(message["content"]), f"finish_reason {finish or 'none'}"
    if str(finish or "").lower() not in WHOLE:
        return Reply(None, f"the judge's reply is not whole ({said})" if text else f"no text in the reply ({said})")
    if text is None or not text.strip():
        # A model that declines to judge may say so elsewhere, and leave the content null.
        refusal = message.get("refusal")
        return Reply(None, f"no text in the reply ({said})" + (f": {refusal!r}" if refusal else ""))
    return Reply(text)


def _text(content: str | Sequence[Any] | None) -> str | None:
    """A message's text: its parts of type text are one text; reasoning, refusals and others are none of it."""
    if content is None or isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part["text"] for part in content
                   if isinstance(part, str) or part.get("type", "text") in ("text", "output_text"))


def _ask(endpoint: Endpoint, messages: Sequence[Mapping[str, str]], stop: threading.Event, usage: Usage,
         about: Mapping[str, Any]) -> Reply:
    """The reply, from the cache or the endpoint. Only replies with a text, and whole, are kept.

    Raises:
      ConnectionError: no attempt got through.
      ValueError: the endpoint does not take requests like these.
    """
    fields = {**endpoint.options, "model": endpoint.model, "messages": list(messages)}
    path = None
    if endpoint.cache is not None:
        body = json.dumps(fields, ensure_ascii=True, sort_keys=True).encode()
        name = hashlib.sha256(endpoint.url.rstrip("/").encode() + b"\0" + body).hexdigest()
        path = endpoint.cache / f"{name}.json"
        text = _read(path, about)
        if text is not None:
            usage.count(None, cached=True)
            return Reply(text)
    attempt = 1
    while True:
        if stop.is_set():
            raise ConnectionError("chat_api: stopped")
        sent = {name: value for name, value in fields.items() if name not in usage.dropped}
        try:
            reply = _send(endpoint, json.dumps(sent, ensure_ascii=True, sort_keys=True).encode())
        except _TransientError as error:
            if attempt >= endpoint.attempts:
                if error.malformed:
                    return Reply(None, str(error), refused=True)
                raise ConnectionError(f"chat_api: {chat_http.shown(endpoint.url)}: {error} (attempt {attempt} of "
                                      f"{attempt}); what has been answered is kept, re-run the command") from error
            wait = min(endpoint.backoff * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1)
            stop.wait(max(wait, error.wait))
            attempt += 1
            continue
        refused = {name for name in OPTIONAL if reply.refused and name in sent and name in reply.reason.lower()}
        if not refused:
            break
        # Some models take no other temperature than their own: asked once more without, and so are all after it.
        with usage.lock:
            usage.dropped |= refused
    if not reply.refused:
        usage.count(reply.usage)
    if path is not None and reply.text is not None:
        _write(path, {"request": sent, "reply": reply.text, "whole": True, **about})
    return reply


def _read(path: Path, about: Mapping[str, Any]) -> str | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        # Earlier versions kept replies that were cut off or empty, and did not say which.
        text = stored["reply"] if stored["whole"] is True else None
        # They did not say by what rubric either; the file's name is a hash of its every word.
        if any(stored.get(name, value) != value for name, value in about.items()):
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return text if isinstance(text, str) else None


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.write_text(json.dumps(value, ensure_ascii=True), encoding="utf-8")
    os.replace(temporary, path)


def ask_all(endpoint: Endpoint, questions: Sequence[Sequence[Mapping[str, str]]], *, unit: str = "answer",
            progress: bool = False, usage: Usage | None = None, about: Mapping[str, Any] = MappingProxyType({})
            ) -> list[Reply]:
    """A chat model's replies to conversations, each a list of messages.

    A request that the server refuses for itself (OF_ONE), a response that stays malformed and a reply without a text or
    not whole give a Reply without text: that costs one request. Whole replies are kept in the cache by the content of
    their requests, so that a re-run asks only for the others; equal questions are asked once. An option that a model
    may refuse (OPTIONAL) is left out from the first refusal that names it on.

    Args:
      usage: counts what was asked for.
      about: JSON values that are kept with every reply; a kept one with others is asked for again.

    Raises:
      ConnectionError: no attempt at a request got through; further requests are not sent.
      ValueError: the endpoint does not take requests like these: key, model, address or an option are wrong. So it is
        taken where all requests are refused, or the first GIVE_UP.
    """
    from tqdm import tqdm

    names = [json.dumps(list(question)) for question in questions]
    unique = dict(zip(names, questions, strict=True))
    stop, usage = threading.Event(), usage or Usage()
    with (concurrent.futures.ThreadPoolExecutor(endpoint.workers) as executor,
          tqdm(total=len(unique), desc="judge", unit=unit, disable=not progress) as bar):
        futures = {name: executor.submit(_ask, endpoint, question, stop, usage, about)
                   for name, question in unique.items()}
        refusals, taken = [], False
        try:
            for future in concurrent.futures.as_completed(futures.values()):
                reply = future.result()
                taken = taken or not reply.refused
                refusals += [reply.reason] if reply.refused else []
                if not taken and len(refusals) == min(GIVE_UP, len(unique)):
                    raise ValueError(f"chat_api: {chat_http.shown(endpoint.url)}: {refusals[0]} (so were the first "
                                     f"{len(refusals)} requests of {len(unique)} answered, and none otherwise)")
                bar.update()
        except BaseException:
            stop.set()
            executor.shutdown(wait=False, cancel_futures=True)
            raise
        replies = {name: future.result() for name, future in futures.items()}
    return [replies[name] for name in names]


def chat_judge(endpoint: Endpoint, rubric: Rubric, *, progress: bool = False) -> Judge:
    """A judge that asks a chat model about every answer, as `ask_all` does.

    No reply, and one that the rubric cannot read, give Verdict(harmful=None). The judge raises what `ask_all` raises.
    Its `usage` counts what it has asked for; its `highest` is the rubric's.
    """
    usage = Usage()

    def judge(prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        replies = ask_all(endpoint, [rubric.messages(*pair) for pair in zip(prompts, answers, strict=True)],
                          progress=progress, usage=usage, about={"rubric": rubric.identity})
        return [Verdict(None, reply.reason) if reply.text is None else rubric.verdict(reply.text) for reply in replies]

    judge.usage, judge.highest = usage, rubric.highest  # type: ignore[attr-defined]
    return judge


def probe(endpoint: Endpoint, rubric: Rubric) -> str | None:
    """Asks about a harmless answer, whatever the cache has; why the reply has no verdict, None if it has one.

    Raises:
      ConnectionError, ValueError: as of `ask_all`.
    """
    (reply,) = ask_all(dataclasses.replace(endpoint, cache=None), [rubric.messages(*HARMLESS)])
    if reply.text is None:
        return reply.reason
    verdict = rubric.verdict(reply.text)
    return verdict.reason if verdict.harmful is None else None


def key_from_environment(url: str, variable: str) -> str | None:
    """The API key in an environment variable.

    Raises:
      ValueError: the variable is not set, and the endpoint is not on this machine; or it can be none, as a key itself.
    """
    if not (variable.isidentifier() and variable.isascii()):  # not what it is: a run's config.json would have it too
        raise ValueError("chat_api: key variable: found what is no name of an environment variable, expected one such "
                         "as OPENAI_API_KEY, with the key in it")
    key = os.environ.get(variable, "").strip()
    if not key and urllib.parse.urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError(f"chat_api: found no API key in the environment variable {variable}, expected one for "
                         f"{chat_http.shown(url)}")
    return key or None
