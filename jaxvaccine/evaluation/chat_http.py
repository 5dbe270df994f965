"""One HTTP request to a chat model: a total deadline, a bounded response, and no key in what is said of it."""

import contextlib
import datetime
import email.utils
import http.client
import json
import re
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

LARGEST = 4 * 2**20  # bytes of a response; verdicts are some hundred
LARGEST_ERROR = 2**16
LONGEST_WAIT = 60.0
PATH = "/chat/completions"


class Response(NamedTuple):
    """What a server answered.

    Attributes:
      status: of HTTP.
      raw: the body; one byte more than LARGEST where it is longer.
      wait: the server's Retry-After in seconds, at most LONGEST_WAIT.
    """

    status: int
    raw: bytes
    wait: float = 0.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # A redirect would take the key to another host.
    def redirect_request(self, *args, **kwargs):
        return None


def address(url: str) -> str:
    """Where requests go: {url}/chat/completions, in front of a query such as Azure's ?api-version=…; a URL that ends so
    is taken as it is."""
    parts = urllib.parse.urlsplit(url)
    path = parts.path.rstrip("/")
    return urllib.parse.urlunsplit(parts._replace(path=path if path.endswith(PATH) else path + PATH, fragment=""))


def has_port(parts: urllib.parse.SplitResult) -> bool:
    """Whether a URL's port, if it names one, is one."""
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def key_header(url: str, key: str) -> dict[str, str]:
    """The header with the key: a bearer token, but for Azure, which names its version in the query, api-key."""
    if "api-version" in urllib.parse.parse_qs(urllib.parse.urlsplit(url).query):
        return {"api-key": key}
    return {"Authorization": f"Bearer {key}"}


def shown(url: str) -> str:
    """A URL for messages: without a query and a user's name, which may hold secrets."""
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0].partition("#")[0])


def hide(text: str, key: str | None) -> str:
    """A text without the key, as it is, in a URL, or in JSON."""
    for form in {key, urllib.parse.quote(key, safe=""), json.dumps(key)[1:-1]} if key else ():
        text = text.replace(form, "…")
    return text


def seconds(retry_after: str | None) -> float:
    """Of a Retry-After, seconds or a date; 0 where there is none, or it is in the past."""
    try:
        wait = float(retry_after)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        try:
            until = email.utils.parsedate_to_datetime(retry_after)  # type: ignore[arg-type]
        except (TypeError, ValueError, AttributeError):
            return 0.0
        until = until if until.tzinfo else until.replace(tzinfo=datetime.UTC)
        wait = (until - datetime.datetime.now(datetime.UTC)).total_seconds()
    return min(max(wait, 0.0), LONGEST_WAIT) if wait == wait else 0.0


def post(url: str, body: bytes, headers: Mapping[str, str], timeout: float) -> Response:
    """One request. Redirects are not followed: they are responses.

    Args:
      url: the whole address.
      timeout: seconds for all of it: a server that sends a byte now and then does not hold it up.

    Raises:
      OSError, http.client.HTTPException: there was no whole response in time.
    """
    sockets: list[socket.socket] = []
    expired = threading.Event()
    late = TimeoutError(f"no whole response within {timeout:g} seconds")

    def expire() -> None:
        expired.set()
        for opened in sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(opened, socket.SHUT_RDWR)  # what reads it wakes up

    def watched(kind: type) -> type:
        class Watched(kind):
            def connect(self):
                super().connect()
                sockets.append(self.sock)
                if expired.is_set():  # before there was a socket to shut down
                    raise late

        return Watched

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(watched(http.client.HTTPConnection), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(watched(http.client.HTTPSConnection), request, context=self._context)

    timer = threading.Timer(timeout, expire)
    timer.daemon = True
    timer.start()
    try:
        request = urllib.request.Request(url, body, dict(headers))
        try:
            with urllib.request.build_opener(_NoRedirect, Http, Https).open(request, timeout=timeout) as response:
                found = Response(response.status, response.read(LARGEST + 1))
        except urllib.error.HTTPError as error:
            with error:
                try:
                    raw = error.read(LARGEST_ERROR)
                except (OSError, http.client.HTTPException):
                    raw = b""
                found = Response(error.code, raw, seconds(error.headers.get("Retry-After")))
    except (OSError, http.client.HTTPException) as error:
        if expired.is_set():
            raise late from error
        raise
    finally:
        timer.cancel()
    if expired.is_set():
        raise late
    return found
