"""Values out of JSON that somebody else may have written: of the right kind, or a one-line error."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from texforce_hub.errors import FileError, one_line
from texforce_hub.evaluate.statistics import Interval


@contextmanager
def decoding(path: Path, what: str) -> Iterator[None]:
    """Turn a missing name or a value of another kind in a file into one line about the file.

    Raises:
        FileError: there is one; ``what`` says what was expected.
    """
    try:
        yield
    except KeyError as error:
        raise FileError(f"{path}: is no {what} that can be read: {error.args[0]!r} is missing") from error
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise FileError(f"{path}: is no {what} that can be read: {one_line(str(error), 120)}") from error


def text(value: Any) -> str:
    """A text.

    Raises:
        ValueError: something else.
    """
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} stands where a text is expected")
    return value


def number(value: Any) -> float:
    """A finite number.

    Raises:
        ValueError: something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.60} stands where a finite number is expected")
    return float(value)


def index(value: Any, below: int) -> int:
    """A whole number from 0, less than ``below``.

    Raises:
        ValueError: something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < below:
        raise ValueError(f"{value!r:.60} stands where a whole number from 0 to {below - 1} is expected")
    return value


def interval(value: Any) -> Interval:
    """An estimate with its interval.

    Raises:
        ValueError, KeyError, TypeError: something else.
    """
    return Interval(number(value["mean"]), number(value["low"]), number(value["high"]))


def inside(folder: Path, name: Any) -> Path:
    """The path of a file that a folder's own list names.

    Raises:
        ValueError: it would lie elsewhere.
    """
    path = folder / text(name)
    if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r:.60} leads out of the folder")
    return path
