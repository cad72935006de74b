"""How the Hub is asked: by ``huggingface_hub``'s own client, with its token, its retries and its timeouts."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported, but not to type checkers
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
    http_stream_backoff,
)

from texforce_hub import __version__
from texforce_hub.hub.huggingface.transport import httpx

LIBRARY = {"library_name": "texforce-hub", "library_version": __version__}

_USER = re.compile(r"(?<=://)[^/?#\s]*@")
_RETRIES = 3  # of an answer that says "later": seven seconds in all


def find_endpoint() -> str:
    """The Hub that is asked, read when it is asked."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def mask_secrets(text: str) -> str:
    """A text without the names and passwords of the addresses in it: ``http://***@host``."""
    return _USER.sub("***@", text)


def _mask_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = mask_secrets(record.getMessage()), None
    return True


logging.getLogger("huggingface_hub.utils._http").addFilter(_mask_record)  # its warnings of retries name addresses


def make_headers() -> dict[str, str]:
    """Who asks, and the user's token if there is one."""
    return dict(build_hf_headers(library_name=LIBRARY["library_name"], library_version=LIBRARY["library_version"]))


def ask_json(url: str, params: Mapping[str, Any]) -> Any:
    """What an address of the Hub's interface answers; an answer that says "later" is waited for."""
    answer = http_backoff(
        "GET",
        url,
        params=params,
        headers=make_headers(),
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
        max_retries=_RETRIES,
        retry_on_exceptions=(),
    )
    hf_raise_for_status(answer)
    return answer.json()


@contextmanager
def open_range(url: str, headers: Mapping[str, str], begin: int, end: int) -> Iterator[httpx.Response]:
    """The answer to the request for the bytes from ``begin`` up to ``end``, its body still to be read."""
    asked = {**headers, "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff("GET", url, headers=asked, timeout=timeout, max_retries=_RETRIES) as answer:
        hf_raise_for_status(answer)
        yield answer
