"""A file that comes in pieces from far away: what is here of it lies aside until all of it is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

ASIDE = ".incomplete"


@contextmanager
def growing(path: Path) -> Iterator[BinaryIO]:
    """A file to append to, beside ``path`` under a name that is always the same; it becomes ``path`` at the end.

    If the block fails, what came stays aside, and the next attempt finds it: ``file.tell()`` says how much it is, and
    ``file.truncate(0)`` begins anew. One process at a time, please.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = find_aside(path)
    with aside.open("ab") as file:
        file.seek(0, os.SEEK_END)
        yield file
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def find_aside(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(path.name + ASIDE)


def write_whole(path: Path, data: bytes) -> None:
    """A small file, whole or not at all; a killed writer leaves nothing that the next one does not take over.

    Raises:
        OSError: it cannot be written.
    """
    with growing(path) as file:
        file.truncate(0)
        file.write(data)
