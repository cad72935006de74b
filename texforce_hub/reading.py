"""Files that others wrote, opened only where they are files and read only up to a bound; the text and TOML in them."""

import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from texforce_hub.errors import FileError, TexForceHubError

LONGEST_TEXT = 50_000_000
"""Bytes of a text file; a hundred thousand prompts have some thirty million."""
_LONGEST_TOML = 2_000_000  # characters; a recipe of a thousand sources has some two hundred thousand
_LONGEST_KEY = 1_000  # characters
_DEEPEST = 40  # tables and lists inside each other, and names joined by dots
_LARGEST_WHOLE = 2**63 - 1  # what TOML asks readers for
_TOML_STRINGS = re.compile(
    r'"""(?:\\.|[^\\])*?"""' + r"|'''.*?'''" + r'|"(?:\\.|[^"\\\n])*"' + r"|'[^'\n]*'" + r"|\#[^\n]*", re.DOTALL
)
_TOML_PATH = re.compile(r"[\w-]+(?:[ \t]*\.[ \t]*[\w-]+)*")

_BLOCK = 2**16  # bytes that are read together
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

Error = type[TexForceHubError]


def open_regular(path: str | Path, *, error: Error = FileError) -> BufferedReader:
    """An ordinary file, opened to be read; whatever else has the name is refused, and waited for by nobody.

    Raises:
        FileError: (or ``error``) nothing is there, it cannot be opened, or it is a folder, a pipe, a device.
    """
    _check_regular(path, error)
    try:
        # By now another thing may have the name, a pipe even, which would be waited for.
        descriptor = os.open(path, os.O_RDONLY | _AT_ONCE)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror or cause}") from cause
    raise error(f"{path}: changed while it was opened; do it again")


def is_there(path: str | Path) -> bool:
    """Whether anything has this name; ``False`` for what is too long for a name, or holds a null character."""
    return "\0" not in str(path) and os.path.exists(path)  # noqa: PTH110  # Path raises where a name is too long


def is_file(path: str | Path) -> bool:
    """Whether an ordinary file has this name, as :func:`is_there`."""
    return is_there(path) and os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | Path) -> bool:
    """Whether a folder has this name, as :func:`is_there`."""
    return is_there(path) and os.path.isdir(path)  # noqa: PTH112


def file_size(path: str | Path) -> int:
    """Bytes of an ordinary file.

    Raises:
        FileError: as :func:`open_regular`.
    """
    return _check_regular(path, FileError)


def _check_regular(path: str | Path, error: Error) -> int:
    try:
        status = os.stat(path)  # noqa: PTH116  # Path takes a null character for no file
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror or cause}") from cause
    except ValueError as cause:  # a null character
        raise error(f"{str(path)!r}: cannot be read: {cause}") from cause
    if stat.S_ISDIR(status.st_mode):
        raise error(f"{path}: is a folder; name the file in it")
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path}: is a pipe, a socket or a device; expected a file")
    return status.st_size


def read_bytes(path: str | Path, *, most: int = LONGEST_TEXT, error: Error = FileError) -> bytes:
    """All of a small file.

    Raises:
        FileError: (or ``error``) it is no file that can be read, or has more than ``most`` bytes.
    """
    with open_regular(path, error=error) as file:
        try:
            data = _read_up_to(file, most + 1)
        except OSError as cause:
            raise error(f"{path}: cannot be read: {cause.strerror or cause}") from cause
    if len(data) > most:
        raise error(f"{path}: has more than {most} bytes; expected fewer of a text")
    return data


def _read_up_to(file: BufferedReader, most: int) -> bytes:
    """At most so many bytes; ``file.read(most)`` would take memory for all of them, however small the file."""
    data = bytearray()
    while len(data) < most and (block := file.read(min(_BLOCK, most - len(data)))):
        data += block
    return bytes(data)


def read_text(path: str | Path, *, most: int = LONGEST_TEXT, error: Error = FileError) -> str:
    """All of a text file: UTF-8, with or without the byte-order mark that editors on Windows write.

    Raises:
        FileError: (or ``error``) as :func:`read_bytes`, or it is no UTF-8 text.
    """
    data = read_bytes(path, most=most, error=error)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{path}: is no UTF-8 text (byte {cause.start}); save it as UTF-8") from cause


def read_json(path: str | Path, *, most: int = LONGEST_TEXT, error: Error = FileError) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileError: (or ``error``) as :func:`read_text`, or it holds no JSON object.
    """
    return parse_json(read_text(path, most=most, error=error), str(path), error=error)


def parse_json(text: str, name: str, *, error: Error = FileError) -> dict[str, Any]:
    """The JSON object in a text; ``name`` is for errors.

    Raises:
        FileError: (or ``error``) it is no JSON, or no object.
    """
    try:
        content = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as cause:
        raise error(f"{name}: is no JSON: {first_line(cause)}") from cause
    if not isinstance(content, dict):
        raise error(f"{name}: holds a JSON {type(content).__name__}; expected an object")
    return content


def read_toml(path: str | Path, *, error: Error = FileError) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
        FileError: (or ``error``) as :func:`read_text` and :func:`parse_toml`.
    """
    return parse_toml(read_text(path, error=error), f"{path}", error=error)


def parse_toml(text: str, name: str, *, error: Error = FileError) -> dict[str, Any]:
    """The table in a TOML text; ``name`` is for errors.

    Raises:
        FileError: (or ``error``) it is no TOML, or is longer, deeper or of larger numbers than settings are.
    """
    text = text.removeprefix("\ufeff")
    if len(text) > _LONGEST_TOML:
        raise error(f"{name}: has {len(text)} characters; expected at most {_LONGEST_TOML}")
    if _nesting(_TOML_STRINGS.sub("s", text)) > _DEEPEST:  # looked at first: the parser calls itself, and copies names
        raise error(f"{name}: is nested more than {_DEEPEST} deep; expected plain settings")
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as cause:
        raise error(f"{name} is not TOML: {first_line(cause)}") from cause
    for problem in _odd_values(table):
        raise error(f"{name}: {problem}")
    return table


def _nesting(text: str) -> int:
    """The deepest nesting of brackets, or the longest name in dots, of a TOML text without its strings."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return max(deepest, *(path.group().count(".") for path in _TOML_PATH.finditer(text)), 0)


def _odd_values(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if len(key) > _LONGEST_KEY:
                yield f"has a name of {len(key)} characters, {key[:40]!r}…; no setting is called so"
            yield from _odd_values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _odd_values(inner)
    elif isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
        # Counted in bits: Python refuses to write a number of thousands of digits in decimals.
        yield f"has a whole number of {value.bit_length()} bits; expected at most {_LARGEST_WHOLE}"


def first_line(error: BaseException, most: int = 200) -> str:
    """What an exception says, in one line of at most ``most`` characters; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__
