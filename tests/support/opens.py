"""How often files are opened: each ``open`` of this process, whoever calls it."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_counters: list[Counter[Path]] = []


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _counters and isinstance(arguments[0], str | bytes | os.PathLike):
        for counter in _counters:
            counter[Path(os.fsdecode(arguments[0]))] += 1


@cache
def _watch() -> None:
    sys.addaudithook(_on_event)  # stays for good: Python takes none away


@contextmanager
def counted_opens() -> Iterator[Counter[Path]]:
    """Count the opens inside, by path as it was given."""
    _watch()
    counter: Counter[Path] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)
