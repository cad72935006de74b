"""Hashes of files: SHA-256, also of the tensors in them, and the one that git gives them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from texforce_hub.errors import FileError
from texforce_hub.reading import file_size, open_regular


def hash_tensors(path: Path) -> str:
    """SHA-256 of what follows a safetensors file's header, hexadecimal: what A1111 knows a LoRA by.

    It stays the same when the file's metadata change.

    Raises:
        FileError: it cannot be read.
    """
    try:
        with open_regular(path) as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, OverflowError) as error:
        raise FileError(f"{path}: cannot be read: {error}") from error


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 of the bytes of some files, one after the other, hexadecimal: of an only file, the file's own.

    Raises:
        FileError: one cannot be read, or is no ordinary file: a device has no end.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open_regular(path) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def hash_as_git(path: Path) -> str:
    """The SHA-1 by which git knows a file's bytes, hexadecimal.

    Raises:
        FileError: it cannot be read.
    """
    try:
        digest = hashlib.sha1(b"blob %d\0" % file_size(path), usedforsecurity=False)
        with open_regular(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
