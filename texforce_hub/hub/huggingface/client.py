"""How the Hub is asked: by ``huggingface_hub``'s own client, with its token, its retries and its timeouts.

What it answers is bounded in bytes and in time, whoever reads it: see :func:`bounded`.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic
from typing import Any

from huggingface_hub import constants, get_session, get_token
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported, but not to type checkers
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
    http_stream_backoff,
)

from texforce_hub import __version__
from texforce_hub.hub.huggingface.transport import httpx

LIBRARY = {"library_name": "texforce-hub", "library_version": __version__}

LONGEST_ANSWER = 32 << 20  # bytes of a listing: a hundred thousand files
_USER = re.compile(r"(?<=://)[^/?#\s]*@")
_TOKEN = re.compile(r"\bhf_\w+|(?i:\bbearer)\s+\S+")
_RETRIES = 3  # of an answer that says "later": seven seconds in all
_SLOWEST = 10_000  # bytes a second, below which a download is given up
_PATIENCE = 3  # times the timeout of one read: what a whole answer may take


def find_endpoint() -> str:
    """The Hub that is asked, read when it is asked."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def mask_secrets(text: str) -> str:
    """A text without tokens, and without the names and passwords of the addresses in it: ``http://***@host``."""
    try:
        token = get_token()
    except OSError:  # its file cannot be read, so it is in no text either
        token = None
    return _TOKEN.sub("***", _USER.sub("***@", text.replace(token, "***") if token else text))


def _mask_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = mask_secrets(record.getMessage()), None
    return True


logging.getLogger("huggingface_hub.utils._http").addFilter(_mask_record)  # its warnings of retries name addresses


def make_headers() -> dict[str, str]:
    """Who asks, and the user's token if there is one."""
    return dict(build_hf_headers(library_name=LIBRARY["library_name"], library_version=LIBRARY["library_version"]))


class EndlessAnswerError(ValueError):
    """An answer that goes on after what was promised, or comes too slowly to be waited for."""


@dataclass(frozen=True, slots=True)
class _Bounds:
    most: int  # bytes of a body
    seconds: float  # from the request to its last byte
    timeout: float  # seconds of one read


_BOUNDS: ContextVar[_Bounds | None] = ContextVar("bounds", default=None)


@contextmanager
def bounded(
    *, most: int = LONGEST_ANSWER, seconds: float | None = None, timeout: float | None = None
) -> Iterator[None]:
    """Cut every answer to this thread's requests after ``most`` bytes or ``seconds``, those of the client's own, too.

    ``timeout``, in seconds, is of one read, for requests that have none.

    Raises:
        EndlessAnswerError: an answer was cut; it is raised where its body is read.
    """
    patience = timeout or constants.HF_HUB_ETAG_TIMEOUT
    _watch(get_session())
    token = _BOUNDS.set(_Bounds(most, _PATIENCE * patience if seconds is None else seconds, patience))
    try:
        yield
    finally:
        _BOUNDS.reset(token)


def _watch(session: httpx.Client) -> None:
    """Let the client's session, which all of the process uses, look at our bounds; without any it is as it was."""
    hooks = session.event_hooks
    if _bound_body not in hooks["response"]:
        session.event_hooks = {
            "request": [*hooks["request"], _bound_reads],
            "response": [*hooks["response"], _bound_body],
        }


def _bound_reads(request: httpx.Request) -> None:
    bounds, timeout = _BOUNDS.get(), request.extensions.get("timeout") or {}
    if bounds is not None and timeout.get("read") is None:
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), bounds.timeout)


def _bound_body(response: httpx.Response) -> None:
    bounds = _BOUNDS.get()
    if bounds is not None and isinstance(response.stream, httpx.SyncByteStream):
        packed = response.headers.get("Content-Encoding", "identity") != "identity"
        most = bounds.most // 100 if packed else bounds.most  # packed bytes grow when they are read
        response.stream = _BoundedStream(response.stream, most, monotonic() + bounds.seconds, bounds.seconds)


class _BoundedStream(httpx.SyncByteStream):
    """A body that ends with an error where it should have ended before."""

    def __init__(self, stream: httpx.SyncByteStream, most: int, deadline: float, seconds: float) -> None:
        self._stream, self._most, self._deadline, self._seconds = stream, most, deadline, seconds

    def __iter__(self) -> Iterator[bytes]:
        left = self._most
        for piece in self._stream:
            left -= len(piece)
            if left < 0:
                raise EndlessAnswerError(f"the answer is longer than {self._most} bytes, which it should not be")
            if monotonic() > self._deadline:
                raise EndlessAnswerError(f"the answer was not complete after {self._seconds:.0f} seconds")
            yield piece

    def close(self) -> None:
        self._stream.close()


def ask_json(url: str, params: Mapping[str, Any]) -> Any:
    """What an address of the Hub's interface answers; an answer that says "later" is waited for."""
    return ask_page(url, params)[0]


def ask_page(url: str, params: Mapping[str, Any]) -> tuple[Any, str]:
    """As :func:`ask_json`, and the address of the next page; empty on the last one."""
    with bounded():
        answer = http_backoff(
            "GET",
            url,
            params=params or None,  # {} would take the query from the address
            headers=make_headers(),
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
            max_retries=_RETRIES,
            retry_on_exceptions=(),
        )
        hf_raise_for_status(answer)
    return answer.json(), str(answer.links.get("next", {}).get("url", ""))


@contextmanager
def open_range(url: str, headers: Mapping[str, str], begin: int, end: int) -> Iterator[httpx.Response]:
    """The answer to the request for the bytes from ``begin`` up to ``end``, its body still to be read."""
    with open_body(url, {**headers, "Range": f"bytes={begin}-{end - 1}"}, most=end - begin + 1) as answer:
        yield answer


@contextmanager
def open_body(url: str, headers: Mapping[str, str], *, most: int) -> Iterator[httpx.Response]:
    """The answer to a request, its body of at most so many bytes still to be read.

    Where it leads to another host, or from https to http, the token stays behind: the client sees to that.
    """
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    asked = {**headers, "Accept-Encoding": "identity"}
    with (
        bounded(most=most, seconds=_PATIENCE * timeout + most / _SLOWEST, timeout=timeout),
        http_stream_backoff("GET", url, headers=asked, timeout=timeout, max_retries=_RETRIES) as answer,
    ):
        hf_raise_for_status(answer)
        yield answer
