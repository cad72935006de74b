"""A process in a reward's own environment: started when it is needed, again when it has died, ended with the run."""

import json
import logging
import queue
import subprocess
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import IO, Any

from texforce_hub.errors import RewardError, one_line

logger = logging.getLogger("texforce_hub")

_PATIENCE = 120.0  # seconds until a new process says its port: its libraries may be large
_FAREWELL = 2.0  # seconds to end by itself
_LINES = 20  # of what it said last


class EnvironmentWorker:
    """A process that serves one reward; it ends with this object and with this process, however that ends.

    Args:
        name: of the reward, for messages.
        command: what is run; it says ``{"port": …}`` on stdout when it answers, and ends when its stdin does.
        path: under which it is asked.
    """

    def __init__(self, name: str, command: Sequence[str], path: str, *, patience: float = _PATIENCE) -> None:
        self.name, self.command, self.path, self.patience = name, list(command), path, patience
        self.port, self.starts = 0, 0
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._said: deque[str] = deque(maxlen=_LINES)
        self.end = weakref.finalize(self, _end, self._processes)

    def locate(self) -> tuple[str, str]:
        """Host with port, and path, of the running process.

        Raises:
            RewardError: it cannot be started, in its own last words.
        """
        with self._lock:
            if not self._processes or self._processes[0].poll() is not None:
                if self.starts:
                    logger.warning("%s: its process is started again: %s", self.name, self._describe())
                _end(self._processes)
                self.port = self._start()
            return f"127.0.0.1:{self.port}", f"/{self.path}"

    def give_up(self) -> str:
        """End the process; how it was."""
        with self._lock:
            state = self._describe()
            _end(self._processes)
            return state

    def _start(self) -> int:
        self.starts += 1
        self._said.clear()
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the run, which may have a last question
        )  # fmt: skip
        self._processes.append(process)
        assert process.stdout is not None  # for mypy: they are pipes
        assert process.stderr is not None
        threading.Thread(target=_listen, args=(process.stderr, self._said, self.name), daemon=True).start()
        try:
            word = _read_word(process.stdout, self.patience)
            if "port" in word:
                return int(word["port"])
            reason = word.get("error") or self._describe()
        except queue.Empty:
            reason = f"it said nothing for {self.patience:g} s"
        _end(self._processes)
        raise RewardError(f"{self.name} cannot be started in its environment: {reason}")

    def _describe(self) -> str:
        """Whether it lives, and what it said last."""
        status = None
        if self._processes:
            try:
                status = self._processes[0].wait(_FAREWELL / 4)
            except subprocess.TimeoutExpired:
                return "it was alive and was ended"
        words = one_line(self._said[-1], 160) if self._said else "nothing"
        return f"it ended with exit status {status}; its last words: {words}"


def _read_word(stream: IO[bytes], patience: float) -> dict[str, Any]:
    """The first line, as JSON; empty where the stream ends first."""
    words: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=lambda: words.put(stream.readline(65536)), daemon=True).start()
    try:
        word = json.loads(words.get(timeout=patience))
    except ValueError:
        return {}
    return word if isinstance(word, dict) else {}


def _listen(stream: IO[bytes], said: deque[str], name: str) -> None:
    """Keep what it says, so that its pipe never fills."""
    for line in iter(lambda: stream.readline(65536), b""):
        text = line.decode(errors="replace").strip()
        if text:
            said.append(text)
            logger.debug("%s: %s", name, text)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Close the process's stdin, which ends it; kill it where that does not."""
    while processes:
        process = processes.pop()
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(_FAREWELL)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
