"""Progress of long work, on stderr, for a person who watches: nothing in pipes, nothing with --quiet."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from texforce_hub.cli.console import LOUDNESS, printable

T = TypeVar("T")


def _is_watched() -> bool:
    return sys.stderr.isatty() and not LOUDNESS.quiet


def track(items: Iterable[T], *, total: int, what: str) -> Iterator[T]:
    """The items as they come, with a bar on stderr if it is a terminal and there are several."""
    if total < 2 or not _is_watched():
        yield from items
        return
    with bars({what: total}) as advance:
        for item in items:
            yield item
            advance(what, 1)


@contextmanager
def bars(totals: Mapping[str, int]) -> Iterator[Callable[[str, int], None]]:
    """A bar for each name, gone in the end; ``advance(name, count)`` moves it."""
    if not _is_watched():
        yield lambda _name, _count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks = {name: progress.add_task(printable(name), total=total) for name, total in totals.items()}
        yield lambda name, count: progress.advance(tasks[name], count)
