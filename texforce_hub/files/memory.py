"""Fresh memory for many numbers, in large pages where the system has them: small ones cost more than filling them."""

import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate

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


def apart(block: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The block's numbers, one after the other, as tensors that each have a storage of their own.

    Whoever saves one of several views writes all that they look at (``torch.save``), refuses it, or takes them for one
    (safetensors' and Accelerate's ``save_model``). In main memory nothing is copied; a device copies.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if block.device.type != "cpu":
        views = torch.split(block, sizes)
        copies = [torch.empty(*shape, dtype=block.dtype, device=block.device) for shape in shapes]
        torch._foreach_copy_(copies, [view.view(*shape) for view, shape in zip(views, shapes)])
        return copies
    memory, dtype, starts = block.view(torch.uint8).numpy(), block.dtype, accumulate(sizes, initial=0)
    return [
        torch.frombuffer(memory, dtype=dtype, count=size, offset=start * dtype.itemsize).view(*shape)
        if size
        else torch.empty(*shape, dtype=dtype)
        for start, size, shape in zip(starts, sizes, shapes)
    ]
