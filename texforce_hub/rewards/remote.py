"""A reward that other processes give: pictures are divided among the workers, and asked for again where one fails."""

import http.client
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from texforce_hub.errors import RewardError
from texforce_hub.reading import first_line
from texforce_hub.rewards.wire import LONGEST_ANSWER, Pixels, read_answer, write_question

ATTEMPTS = 6
TIMEOUT = 120.0
"""Seconds that a worker may be silent."""
BACK_OFF = 0.25
"""Seconds before the second attempt; twice as long before each further."""


class Worker(Protocol):
    """A process that scores."""

    def locate(self) -> tuple[str, str]:
        """Where to ask: host with port, and path. It is started, if it is ours and is not running.

        Raises:
            RewardError: it cannot be started.
        """

    def give_up(self) -> str:
        """How it is, after it did not answer; one of ours is ended, so that the next question starts it again."""


@dataclass(frozen=True)
class Address:
    """A worker that somebody else runs."""

    host: str
    path: str

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The worker at ``http://host:port[/name]``.

        Raises:
            RewardError: it is no such address.
        """
        try:
            parts = urlsplit(text)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise RewardError(f"reward server {text!r}: {error}; expected http://host:port/name") from error
        if parts.scheme != "http" or not host:
            raise RewardError(f"reward server {text!r}; expected http://host:port/name")
        return cls(parts.netloc, parts.path or "/")

    def locate(self) -> tuple[str, str]:
        """Always there."""
        return self.host, self.path

    def give_up(self) -> str:
        """Nothing is known of it, and it is not ours to end."""
        return ""


class _RefusedError(Exception):
    """The server understood and said no: asking again is of no use."""


@dataclass
class Remote:
    """The score by several workers: each is asked about its part of the pictures at once, in turn.

    A part is asked for ``attempts`` times, each time at the next worker: one that does not answer in ``timeout``
    seconds, breaks off, or answers with another status or with numbers that cannot be, is left for the next after a
    pause, ``back_off`` seconds and then twice as long each time.

    Raises:
        RewardError: on a call, that no worker gave the scores, with the last reason.
    """

    workers: Sequence[Worker]
    attempts: int = ATTEMPTS
    timeout: float = TIMEOUT
    back_off: float = BACK_OFF
    wait: Callable[[float], None] = time.sleep
    turns: "itertools.count[int]" = field(default_factory=itertools.count)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores ``(b,)``, float32, of pictures ``(b, 3, h, w)`` in [0, 1]."""
        pixels = images.detach().float().cpu().numpy()
        parts = [part for part in np.array_split(np.arange(len(prompts)), len(self.workers)) if len(part)]
        questions = [(pixels[part], [prompts[i] for i in part], next(self.turns)) for part in parts]
        if len(questions) == 1:
            rows = [self._ask_for(*questions[0])]
        else:
            with ThreadPoolExecutor(len(questions)) as pool:
                rows = list(pool.map(lambda question: self._ask_for(*question), questions))
        return torch.tensor([score for row in rows for score in row], dtype=torch.float32, device=images.device)

    def _ask_for(self, pixels: Pixels, prompts: Sequence[str], turn: int) -> list[float]:
        question, reason = write_question(pixels, prompts), ""
        for attempt in range(self.attempts):
            worker = self.workers[(turn + attempt) % len(self.workers)]
            try:
                host, path = worker.locate()
            except RewardError as error:
                reason = first_line(error)
            else:
                try:
                    return read_answer(_ask(host, path, question, self.timeout), len(prompts))
                except _RefusedError as error:
                    text = f"reward server {host}{path} for the prompt {prompts[0]!r:.200}: {error}"
                    raise RewardError(text) from error
                except (OSError, http.client.HTTPException, RewardError) as error:
                    reason = "; ".join(filter(None, [f"{host}{path}: {first_line(error)}", worker.give_up()]))
            if attempt + 1 < self.attempts:
                self.wait(self.back_off * 2**attempt)
        raise RewardError(
            f"no reward server answered {self.attempts} times for the prompt {prompts[0]!r:.200}; last {reason}"
        )


def remote_reward(addresses: str) -> Remote:
    """The reward at ``http://host:port[/name]``; several addresses, with commas between them, share the pictures.

    Raises:
        RewardError: an address that is none.
    """
    return Remote([Address.parse(address) for address in addresses.split(",")])


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
