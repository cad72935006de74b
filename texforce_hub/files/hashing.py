"""Hashes of files: SHA-256, also of the tensors in them, and the one that git gives them."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path

from texforce_hub.errors import FileError
from texforce_hub.reading import open_regular


def hash_tensors(path: Path) -> str:
    """SHA-256 of what follows a safetensors file's header, hexadecimal: what A1111 knows a LoRA by.

    It stays the same when the file's metadata change.

    Raises:
        FileError: it cannot be read, or has more bytes than its size says.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            for block in _blocks(file, path):
                digest.update(block)
    except (OSError, OverflowError) as error:
        raise FileError(f"{path}: cannot be read: {error}") from error
    return digest.hexdigest()


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 of the bytes of some files, one after the other, hexadecimal: of an only file, the file's own.

    Raises:
        FileError: one cannot be read, or is no ordinary file, or has more bytes than its size says.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open_regular(path) as file:
                for block in _blocks(file, path):
                    digest.update(block)
        except OSError as error:
            raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def hash_as_git(path: Path) -> str:
    """The SHA-1 by which git knows a file's bytes, hexadecimal.

    Raises:
        FileError: it cannot be read, or has more bytes than its size says.
    """
    try:
        with open_regular(path) as file:
            digest = hashlib.sha1(b"blob %d\0" % _size(file), usedforsecurity=False)
            for block in _blocks(file, path):
                digest.update(block)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _blocks(file: BufferedReader, path: Path) -> Iterator[bytes]:
    """What follows in an open file, up to its size: some of Linux's ``/proc`` are ordinary files that never end."""
    size = _size(file)
    left = max(size - file.tell(), 0)
    while block := file.read(min(left, 1 << 20) or 1):
        if not left:
            raise FileError(f"{path}: goes on after its {size} bytes; expected a file that nothing is written to")
        left -= len(block)
        yield block


def _size(file: BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size
