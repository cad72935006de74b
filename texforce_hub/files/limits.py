"""What a tensor file may claim, whatever its container: bounds beyond which no adapter and no model lies."""

import math
from collections.abc import Iterable, Sequence
from pickle import UnpicklingError
from typing import Any, BinaryIO

from texforce_hub.errors import FileError

MOST_TENSORS = 20_000
"""Of one file; the largest adapters have some six thousand, whole pipelines in one file fewer."""
LONGEST_CONFIG = 10_000_000
"""Bytes of a PEFT config; real ones have a few thousand."""
MOST_DIMENSIONS = 8
"""Of one tensor; a three-dimensional convolution's weight has five."""
LARGEST_DIMENSION = 2**31 - 1
LARGEST_OFFSET = 2**63 - 1
"""Bytes, and numbers of one tensor: what a machine can address."""
_MOST_STEPS = 2_000_000  # a tensor takes some sixty; a second of Python


class BoundedReader:
    """A file that a pickle's instructions are read from, one by one, and not without end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, _MOST_STEPS

    def read(self, length: int) -> bytes:
        """That many bytes, fewer at the end.

        Raises:
            UnpicklingError: more instructions than any adapter's pickle has.
        """
        self._left -= 1
        if self._left < 0:
            raise UnpicklingError(f"it has more than {_MOST_STEPS} instructions, which no adapter has")
        return self._file.read(length)

    def readline(self) -> bytes:
        """The bytes up to the end of a line."""
        return self._file.readline()


def is_count(value: Any, most: int = LARGEST_OFFSET) -> bool:
    """Whether it is a whole number from 0 to ``most``."""
    return type(value) is int and 0 <= value <= most


def check_count(tensors: int, name: str) -> None:
    """Refuse more tensors than any adapter or model has: looking at them all would take minutes.

    Raises:
        FileError: there are more than :data:`MOST_TENSORS`.
    """
    if tensors > MOST_TENSORS:
        raise FileError(f"{name}: holds {tensors} tensors; expected at most {MOST_TENSORS}, no adapter has as many")


def check_words(words: Iterable[str], name: str) -> None:
    """Refuse names and metadata that are no Unicode text, which can be neither printed nor written again.

    Raises:
        FileError: one holds a lone surrogate (``\\ud800``), as a JSON escape or a pickle can.
    """
    words = tuple(words)
    try:
        "".join(words).encode("utf-8")
    except UnicodeEncodeError:
        broken = next(word for word in words if any("\ud800" <= character <= "\udfff" for character in word))
        raise FileError(f"{name}: {broken!r:.80} is no Unicode text (a lone surrogate); write the file again") from None


def check_shape(shape: Sequence[Any], tensor: str, name: str) -> None:
    """Refuse what is no tensor's shape, or no tensor's that torch can hold.

    Raises:
        FileError: too many dimensions, or one that is no count or too large, even of a tensor without elements.
    """
    if len(shape) > MOST_DIMENSIONS or not all(is_count(n, LARGEST_DIMENSION) for n in shape):
        raise FileError(
            f"{name}: tensor {tensor!r:.100} has shape {shape!r:.80}; "
            f"expected at most {MOST_DIMENSIONS} dimensions below {LARGEST_DIMENSION + 1}"
        )
    if math.prod(filter(None, shape)) > LARGEST_OFFSET:  # torch multiplies strides even where nothing is
        raise FileError(f"{name}: tensor {tensor!r:.100} has shape {shape!r:.80}, which no machine can address")
