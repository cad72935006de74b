"""A reward that another process gives: asked over HTTP, again where it fails, of several workers in turn."""

import http.client
import itertools
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from torch import Tensor

from texforce_hub.errors import RewardError
from texforce_hub.reading import first_line
from texforce_hub.rewards.reward import Score
from texforce_hub.rewards.wire import LONGEST_ANSWER, read_answer, write_question

ATTEMPTS = 6
TIMEOUT = 120.0
"""Seconds that a worker may be silent."""
BACK_OFF = 0.25
"""Seconds before the second attempt; twice as long before each further."""


class _RefusedError(Exception):
    """The server understood and said no: asking again is of no use."""


def remote_reward(
    addresses: str,
    *,
    attempts: int = ATTEMPTS,
    timeout: float = TIMEOUT,
    back_off: float = BACK_OFF,
    wait: Callable[[float], None] = time.sleep,
) -> Score:
    """The reward at ``http://host:port[/name]``; several addresses, with commas between them, take turns.

    A call fails after ``attempts``, each at the next address: one that does not answer in time, breaks off, answers
    with another status or with numbers that cannot be is left for the next.

    Raises:
        RewardError: an address that is none; on a call, that no worker gave the scores, with the last reason.
    """
    workers = [_parse(address) for address in addresses.split(",")]
    turns = itertools.count()

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        question = write_question(images, prompts)
        reason = ""
        for attempt in range(attempts):
            host, path = workers[next(turns) % len(workers)]
            try:
                return read_answer(_ask(host, path, question, timeout), len(prompts)).to(images.device)
            except _RefusedError as error:
                raise RewardError(f"reward server {host}{path} for the prompt {prompts[0]!r:.200}: {error}") from error
            except (OSError, http.client.HTTPException, RewardError) as error:
                reason = f"{host}{path}: {first_line(error)}"
            if attempt + 1 < attempts:
                wait(back_off * 2**attempt)
        raise RewardError(
            f"no reward server answered {attempts} times for the prompt {prompts[0]!r:.200}; last {reason}"
        )

    return score


def _parse(address: str) -> tuple[str, str]:
    """Host with port, and path."""
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise RewardError(f"reward server {address!r}: {error}; expected http://host:port/name") from error
    if parts.scheme != "http" or not host:
        raise RewardError(f"reward server {address!r}; expected http://host:port/name")
    return parts.netloc, parts.path or "/"


def _ask(host: str, path: str, question: bytes, timeout: float) -> bytes:
    connection = http.client.HTTPConnection(host, timeout=timeout)
    try:
        connection.request("POST", path, question, {"Content-Type": "application/octet-stream"})
        response = connection.getresponse()
        answer = response.read(LONGEST_ANSWER + 1)
        if len(answer) > LONGEST_ANSWER:
            raise RewardError(f"an answer of more than {LONGEST_ANSWER} bytes")
        if 400 <= response.status < 500:
            raise _RefusedError(_words(answer, response.status))
        if response.status != 200:
            raise RewardError(_words(answer, response.status))
        return answer
    finally:
        connection.close()


def _words(answer: bytes, status: int) -> str:
    try:
        read_answer(answer, 0)
    except RewardError as error:
        return f"status {status}: {error}"
    return f"status {status}"
