"""CPU seconds of calls that take turns: medians, and how far the middle half of the calls lies apart."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Timed:
    """The times of one call, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        """In milliseconds, with the quarters around the middle: ``12.3 (11.9–14.0)``."""
        if len(self.seconds) == 1:
            return f"{1e3 * self.median:.1f}"
        low, high = statistics.quantiles(self.seconds, n=4, method="inclusive")[::2]
        return f"{1e3 * self.median:.1f} ({1e3 * low:.1f}–{1e3 * high:.1f})"


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    after: Mapping[str, Callable[[], Any]] | None = None,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Timed]:
    """Each call ``repeats`` times and once before that; ``after`` undoes a call, and is timed as ``"NAME off"``.

    ``clock`` tells the time in seconds: by default that of the processor which this process has had.
    """
    seconds: dict[str, list[float]] = {}
    for number in range(repeats + 1):
        for name, call in calls.items():
            for label, action in ((name, call), (f"{name} off", (after or {}).get(name))):
                if action is None:
                    continue
                start = clock()
                action()
                if number:
                    seconds.setdefault(label, []).append(clock() - start)
    return {name: Timed(tuple(values)) for name, values in seconds.items()}


def ratio(theirs: Timed, ours: Timed) -> float:
    """How many times as long theirs took: the median of the turns' own ratios."""
    return statistics.median(a / b for a, b in zip(theirs.seconds, ours.seconds))


def row(*cells: object) -> None:
    """Print a row of a table at once."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(*cells: str) -> None:
    """Print the head of a table."""
    row(*cells)
    row(*["---"] * len(cells))


def commit() -> str:
    """The commit that is measured."""
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's name where the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
