"""Fresh memory for many numbers, in large pages where the system has them: small ones cost more than filling them."""

import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

_WORTH_IT = 1 << 21
"""Bytes of a large page: less than one gains nothing."""


def fresh_bytes(count: int) -> Tensor:
    """``(count,)`` bytes of main memory, to be filled; they are let go of with the last tensor that looks at them.

    Raises:
        RuntimeError: they are more than the memory.
    """
    if count < _WORTH_IT or not sys.platform.startswith("linux"):
        return torch.empty(count, dtype=torch.uint8)
    try:
        block = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RuntimeError(f"{count} bytes: {error.strerror}") from error
    with suppress(OSError):  # a system without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)


def fresh(count: int, dtype: torch.dtype) -> Tensor:
    """``(count,)`` numbers of main memory, to be filled.

    Raises:
        RuntimeError: they are more than the memory.
    """
    return fresh_bytes(count * dtype.itemsize).view(dtype)
