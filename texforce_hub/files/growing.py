"""Files that grow: what comes in pieces from far away lies aside until it is whole; a log gets line after line."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from texforce_hub.errors import FileError

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


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """More lines of a log, on the disk when this returns. What a killed writer began of one stays a line of its own.

    Raises:
        FileError: it cannot be written.
    """
    try:
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                lines = ["", *lines] if file.read(1) != b"\n" else lines
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from error
