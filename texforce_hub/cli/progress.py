"""Progress of long work, on stderr, for a person who watches."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")


def track(items: Iterable[T], *, total: int, what: str) -> Iterator[T]:
    """The items as they come, with a bar on stderr if it is a terminal and there are several."""
    if total < 2 or not sys.stderr.isatty():
        yield from items
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, total=total, description=what)
