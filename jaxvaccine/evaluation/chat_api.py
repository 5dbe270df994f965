"""A chat model behind an OpenAI-compatible endpoint as a judge, with retries and a cache on disk."""

import concurrent.futures
import dataclasses
import hashlib
import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxvaccine.evaluation.judges import Judge, Verdict
from jaxvaccine.evaluation.rubrics import Rubric

RETRIED = (408, 409, 425, 429)  # and everything from 500 on
# What servers answer to one request for its content: content filters and moderation, and what is too long. They answer
# the same where a key, a model or an option is wrong; then they answer it to all.
OF_ONE = (400, 403, 413, 422, 451)
GIVE_UP = 20  # refusals in a row from the first request on
# How a model says that its reply is whole; servers that say nothing are believed.
WHOLE = ("", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "completed")
LONGEST_WAIT = 60.0


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where and how a chat model is asked.

    Attributes:
      url: of the API, such as "https://api.openai.com/v1"; requests go to {url}/chat/completions, in front of a
        query such as Azure's ?api-version=…; or the whole address.
      model: its name there.
      key: sent as a bearer token; None sends none.
      options: further fields of every request.
      timeout: seconds without an answer after which an attempt has failed.
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
            raise ValueError(f"chat_api: url: found {self.url!r}, expected http:// or https:// and a host")
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
    """

    text: str | None
    reason: str = ""
    refused: bool = False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # A redirect would take the key to another host.
    def redirect_request(self, *args, **kwargs):
        return None


def _address(url: str) -> str:
    """Where requests go: the path ends in /chat/completions, if it does not already, and a query stays behind it."""
    parts = urllib.parse.urlsplit(url)
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return urllib.parse.urlunsplit(parts._replace(path=f"{path}/chat/completions"))


def _send(endpoint: Endpoint, body: bytes) -> Reply:
    """One attempt."""
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "jaxvaccine"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    request = urllib.request.Request(_address(endpoint.url), body, headers)
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=endpoint.timeout) as response:
            raw = response.read()
    except urllib.error.HTTPError as error:
        with error:
            reason = f"HTTP {error.code}: {_excerpt(error)}"
        if endpoint.key:
            reason = reason.replace(endpoint.key, "…")
        if error.code in RETRIED or error.code >= 500:
            raise _TransientError(reason, _seconds(error.headers.get("Retry-After"))) from error
        if error.code in OF_ONE:
            return Reply(None, reason, refused=True)
        raise ValueError(f"chat_api: {endpoint.url}: {reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(f"{type(error).__name__}: {getattr(error, 'reason', error)}") from error
    try:
        return _read_response(json.loads(raw))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _TransientError(f"malformed response {raw[:120]!r}", malformed=True) from error


def _read_response(response: Mapping[str, Any]) -> Reply:
    """The reply in an endpoint's JSON. Raises LookupError, TypeError or AttributeError if it is none."""
    error = response.get("error")
    if isinstance(error, Mapping) and error.get("code") in OF_ONE:  # as gateways that have begun to answer 200
        return Reply(None, f"error {error['code']}: {str(error.get('message'))[:200]}", refused=True)
    choice = response["choices"][0]
    message, finish = choice["message"], choice.get("finish_reason")
    text, said = _text(message["content"]), f"finish_reason {finish or 'none'}"
    if str(finish or "").lower() not in WHOLE:
        return Reply(None, f"the judge's reply is not whole ({said})" if text else f"no text in the reply ({said})")
    if text is None or not text.strip():
        # A model that declines to judge may say so elsewhere, and leave the content null.
        refusal = message.get("refusal")
        return Reply(None, f"no text in the reply ({said})" + (f": {refusal!r:.200}" if refusal else ""))
    return Reply(text)


def _text(content: str | Sequence[Any] | None) -> str | None:
    """A message's text: its parts of type text are one text; reasoning, refusals and others are none of it."""
    if content is None or isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part["text"] for part in content
                   if isinstance(part, str) or part.get("type", "text") in ("text", "output_text"))


def _excerpt(response) -> str:
    try:
        return " ".join(response.read(600).decode("utf-8", "replace").split())[:200] or "no text"
    except (OSError, http.client.HTTPException):
        return "no text"


def _seconds(retry_after: str | None) -> float:
    try:
        return min(max(float(retry_after), 0.0), LONGEST_WAIT)
    except (TypeError, ValueError):  # absent, or a date
        return 0.0


def _ask(endpoint: Endpoint, messages: Sequence[Mapping[str, str]], stop: threading.Event) -> Reply:
    """The reply, from the cache or the endpoint. Only replies with a text, and whole, are kept.

    Raises:
      ConnectionError: no attempt got through.
      ValueError: the endpoint does not take requests like these.
    """
    fields = {**endpoint.options, "model": endpoint.model, "messages": list(messages)}
    body = json.dumps(fields, ensure_ascii=True, sort_keys=True).encode()
    path = None
    if endpoint.cache is not None:
        name = hashlib.sha256(endpoint.url.rstrip("/").encode() + b"\0" + body).hexdigest()
        path = endpoint.cache / f"{name}.json"
        text = _read(path)
        if text is not None:
            return Reply(text)
    for attempt in range(1, endpoint.attempts + 1):
        if stop.is_set():
            raise ConnectionError("chat_api: stopped")
        try:
            reply = _send(endpoint, body)
            break
        except _TransientError as error:
            if attempt == endpoint.attempts:
                if error.malformed:
                    return Reply(None, str(error), refused=True)
                raise ConnectionError(f"chat_api: {endpoint.url}: {error} (attempt {attempt} of {attempt}); what has "
                                      "been answered is kept, re-run the command") from error
            wait = min(endpoint.backoff * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1)
            stop.wait(max(wait, error.wait))
    if path is not None and reply.text is not None:
        _write(path, {"request": fields, "reply": reply.text, "whole": True})
    return reply


def _read(path: Path) -> str | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        # Earlier versions kept replies that were cut off or empty, and did not say which.
        text = stored["reply"] if stored["whole"] is True else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.write_text(json.dumps(value, ensure_ascii=True), encoding="utf-8")
    os.replace(temporary, path)


def ask_all(endpoint: Endpoint, questions: Sequence[Sequence[Mapping[str, str]]], *, unit: str = "answer",
            progress: bool = False) -> list[Reply]:
    """A chat model's replies to conversations, each a list of messages.

    A request that the server refuses for itself (OF_ONE), a response that stays malformed and a reply without a text or
    not whole give a Reply without text: that costs one request. Whole replies are kept in the cache by the content of
    their requests, so that a re-run asks only for the others; equal questions are asked once.

    Raises:
      ConnectionError: no attempt at a request got through; further requests are not sent.
      ValueError: the endpoint does not take requests like these: key, model, address or an option are wrong. So it is
        taken where all requests are refused, or the first GIVE_UP.
    """
    from tqdm import tqdm

    names = [json.dumps(list(question)) for question in questions]
    unique = dict(zip(names, questions, strict=True))
    stop = threading.Event()
    with (concurrent.futures.ThreadPoolExecutor(endpoint.workers) as executor,
          tqdm(total=len(unique), desc="judge", unit=unit, disable=not progress) as bar):
        futures = {name: executor.submit(_ask, endpoint, question, stop) for name, question in unique.items()}
        refusals, taken = [], False
        try:
            for future in concurrent.futures.as_completed(futures.values()):
                reply = future.result()
                taken = taken or not reply.refused
                refusals += [reply.reason] if reply.refused else []
                if not taken and len(refusals) == min(GIVE_UP, len(unique)):
                    raise ValueError(f"chat_api: {endpoint.url}: {refusals[0]} (so were the first {len(refusals)} "
                                     f"requests of {len(unique)} answered, and none otherwise)")
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
    """
    def judge(prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        replies = ask_all(endpoint, [rubric.messages(*pair) for pair in zip(prompts, answers, strict=True)],
                          progress=progress)
        return [Verdict(None, reply.reason) if reply.text is None else rubric.verdict(reply.text) for reply in replies]

    return judge


def key_from_environment(url: str, variable: str) -> str | None:
    """The API key in an environment variable.

    Raises:
      ValueError: the variable is not set, and the endpoint is not on this machine.
    """
    key = os.environ.get(variable, "").strip()
    if not key and urllib.parse.urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError(f"chat_api: found no API key in the environment variable {variable}, expected one for {url}")
    return key or None
