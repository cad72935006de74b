"""A reward server: rewards that want a machine or an environment of their own, asked over HTTP; without torch."""

import json
import logging
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from texforce_hub.errors import RewardError
from texforce_hub.reading import first_line
from texforce_hub.rewards.functions import ArrayScore
from texforce_hub.rewards.wire import LONGEST_QUESTION, read_question

logger = logging.getLogger("texforce_hub")

_SILENCE = 60  # seconds that a client may be silent
_BATCH = 32  # pictures at once


class RewardServer(ThreadingHTTPServer):
    """Answers ``POST /`` (of an only reward) and ``POST /NAME`` with scores, ``GET /`` with the rewards' names.

    A reward is asked by one request at a time. Messages are bounded; a client that is silent is let go.
    """

    daemon_threads = True

    def __init__(self, scores: Mapping[str, ArrayScore], host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; port 0 takes a free one.

        Raises:
            RewardError: the address cannot be listened at.
        """
        self.scores = dict(scores)
        self.locks = {name: threading.Lock() for name in scores}
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise RewardError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error

    @property
    def address(self) -> str:
        """As ``--reward`` takes it."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def score(self, path: str, message: bytes | bytearray) -> list[float]:
        """The scores that a question at a path asks for, weights not counted.

        Raises:
            RewardError: no such reward, no such message, or the reward fails.
        """
        name = path.strip("/") or (next(iter(self.scores)) if len(self.scores) == 1 else "")
        if name not in self.scores:
            raise RewardError(f"no reward {name!r:.80} here; ask for one of {', '.join(self.scores)}")
        images, prompts = read_question(message)
        with self.locks[name]:
            starts = range(0, len(prompts), _BATCH)
            rows = [self.scores[name](images[i : i + _BATCH], prompts[i : i + _BATCH]) for i in starts]
        return [float(number) for number in np.concatenate(rows)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that broke off is nothing to print a traceback for."""
        del request
        logger.info("%s:%s broke off", *client_address[:2])


class _Handler(BaseHTTPRequestHandler):
    timeout = _SILENCE
    server: RewardServer

    def do_GET(self) -> None:  # the library's name for it
        self._answer(200, {"rewards": list(self.server.scores)})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or not 0 < int(length) <= LONGEST_QUESTION:
            self.close_connection = True
            self._answer(413, {"error": f"a question of {length[:20]!r} bytes; expected 1 to {LONGEST_QUESTION}"})
            return
        message = bytearray(int(length))
        try:
            received = self.rfile.readinto(message)
            scores = self.server.score(self.path, message if received == len(message) else message[:received])
        except RewardError as error:
            self._answer(400, {"error": first_line(error)})
        except Exception as error:  # noqa: BLE001  # a client must hear of it, whatever a reward's code raises
            self._answer(500, {"error": f"{type(error).__name__}: {first_line(error)}"})
        else:
            self._answer(200, {"scores": scores})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        logger.debug("%s " + format, self.address_string(), *arguments)
