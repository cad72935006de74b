"""A change added to a weight: in float32, rounded once to the weight's dtype, and what the rounding loses of it."""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from texforce_hub.adapter.algebra import concat
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import wide, wide_alike
from texforce_hub.adapter.value import Layer
from texforce_hub.apply.placement import Placed
from texforce_hub.apply.rounding import round_to

Term = tuple[Layer | Placed, float]
"""A change and its weight."""
Halves = tuple[Tensor, Tensor]
"""``(out, rank)`` and ``(rank, in · kernel)``, the scale in them."""

_POOL = threading.local()
_BLOCK = 1 << 21
"""Bytes of float32 that are summed at once: what a processor's cache holds, and enough to be worth the calls."""
_ONE_SUM = 128
"""Up to this rank each number of a product is one sum in registers, and the weight can be added to it there."""
_SAMPLED = 32
"""Of so many rows of a large weight, one is measured for what rounding loses: evenly over all of it."""
_ENOUGH = 1 << 14
"""So many numbers are measured at least, if there are: what they lose is within a few percent that of all."""
_LARGE, _ROWS = 1 << 15, 16
"""Numbers of a weight, and rows summed at once, from which on the sums of a product do not depend on its size."""


def summed(base: Tensor, terms: Sequence[Term], out: Tensor | None = None) -> Tensor:
    """``base + Σ weight · delta`` in float32, rounded once to the dtype of ``base``; runs on its device.

    ``out``, another tensor of the same shape and dtype, takes the result.
    """
    halves, others = _sorted_terms(base, terms)
    total = wide(base)
    if halves is not None:
        up, down = (half.to(total.dtype) for half in halves)
        if out is not None and not others and out.dtype == total.dtype and out.is_contiguous():
            torch.addmm(total.flatten(1), up, down, out=out.view(out.shape[0], -1))
            return out
        total = torch.addmm(total.flatten(1), up, down).view(base.shape)
    for layer, weight in others:
        total = total + weight * layer.delta(base)
    return total.to(base.dtype) if out is None else out.copy_(total)


def rounded_sum(
    base: Tensor, terms: Sequence[Term], seed: int | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`summed` for a ``base`` narrower than float32, and what the rounding lost of the change.

    A block of rows is widened, summed and rounded while it is in the processor's cache. The loss is measured on all
    numbers of a small weight and of one rounded at random, else on every 32nd row. The change is never read back
    out of a sum that has swallowed it.

    Args:
        out: a contiguous tensor of the same shape and dtype, takes the result.

    Returns:
        the sum, contiguous, and ``(2,)`` norms of the error and of the change, on the device of ``base``.
    """
    result = torch.empty(base.shape, dtype=base.dtype, device=base.device) if out is None else out
    if not base.numel():
        return result, torch.zeros(2, device=base.device)
    flat = (base.shape[0], -1)
    old, new = base.reshape(flat), result.view(flat)
    blocks = _blocks(old)
    least = min(rows.stop - rows.start for rows in blocks)
    change = _as_change(base, *_sorted_terms(base, terms), least)
    if seed is None:
        for rows in blocks:
            new[rows].copy_(change.add_to(_widened(old[rows], change.dtype, "sum"), rows))
    else:
        total = change.add_to(_widened(old, change.dtype, "sum"), slice(None))
        new.copy_(round_to(total, base.dtype, seed))
    step = 1 if seed is not None else min(_SAMPLED, max(1, base.numel() // _ENOUGH))
    return result, _measure(old, new, change, slice(None, None, step))


def _measure(old: Tensor, new: Tensor, change: "_Product | _Numbers", rows: slice) -> Tensor:
    """The norms of ``(new − old) − change`` and of the change, as these rows tell them of all."""
    added, before = change.at(rows), old[rows]
    lost = _widened(before, change.dtype, "sum").sub_(_widened(new[rows], change.dtype, "rounded")).add_(added)
    norms = torch.stack([torch.linalg.vector_norm(lost), torch.linalg.vector_norm(added)])
    return norms.mul_(math.sqrt(old.shape[0] / before.shape[0]))


class _Product:
    """A change of low rank, multiplied out only as it is added; its scale is in its halves."""

    dtype = torch.float32

    def __init__(self, up: Tensor, down: Tensor) -> None:
        self.up, self.down = up, down

    def add_to(self, total: Tensor, rows: slice) -> Tensor:
        """Add these rows of it to as many of a sum, in place."""
        return total.addmm_(self.up[rows], self.down)

    def at(self, rows: slice) -> Tensor:
        """These rows of it."""
        return _multiplied(self.up[rows], self.down)


class _Numbers:
    """A change by all its numbers."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.dtype = values.reshape(values.shape[0], -1), values.dtype

    def add_to(self, total: Tensor, rows: slice) -> Tensor:
        """Add these rows of it to as many of a sum, in place."""
        return total.add_(self.values[rows])

    def at(self, rows: slice) -> Tensor:
        """These rows of it."""
        return self.values[rows]


def _as_change(base: Tensor, halves: Halves | None, others: Sequence[Term], least: int) -> _Product | _Numbers:
    """All terms as one change of a weight of which at least so many rows are summed at once.

    A product is added to the weight while it is multiplied, where that gives the bits of adding it afterwards. So it
    is where each of its numbers is one sum in registers: not at high ranks, which are summed in pieces, and not of
    small weights or few rows, for which processors' libraries have ways of their own.
    """
    if halves is not None and not others and base.numel() >= _LARGE and least >= _ROWS:
        up, down = halves
        if up.dtype == torch.float32 and up.shape[1] <= _ONE_SUM:
            return _Product(up, down)
    change = torch.zeros(base.shape, device=base.device)
    if halves is not None:
        change = _multiplied(*halves).view(base.shape)
    for layer, weight in others:
        change = change + weight * layer.delta(base)
    return _Numbers(change)


def _multiplied(up: Tensor, down: Tensor) -> Tensor:
    """The product, in memory that the next one overwrites, where memory is reused."""
    shape = (up.shape[0], down.shape[1])
    return torch.mm(up, down, out=_borrow("change", shape, up) if up.dtype == torch.float32 else None)


def _blocks(weight: Tensor) -> list[slice]:
    """Rows that are worked on at once: on a processor what its cache holds, elsewhere all."""
    rows = weight.shape[0]
    count = min(rows, -(-4 * weight.numel() // _BLOCK)) if weight.device.type == "cpu" else 1
    return [slice(rows * index // count, rows * (index + 1) // count) for index in range(count)]


def _widened(values: Tensor, dtype: torch.dtype, purpose: str) -> Tensor:
    """A copy in a wider dtype; in memory that the next copy for this purpose overwrites, where memory is reused."""
    memory = _borrow(purpose, values.shape, values) if dtype == torch.float32 else None
    return values.to(dtype, copy=True) if memory is None else memory.copy_(values)


def _sorted_terms(base: Tensor, terms: Sequence[Term]) -> tuple[Halves | None, Sequence[Term]]:
    """The low-rank terms as one pair of halves, and the others, on the device of ``base``."""
    here = [(_brought(layer, base.device), weight) for layer, weight in terms]
    pairs = [(layer, weight) for layer, weight in here if isinstance(layer, LowRank)]
    others = [(layer, weight) for layer, weight in here if not isinstance(layer, LowRank)]
    if not pairs:
        return None, others
    if len(pairs) > 1:
        pair = concat([layer for layer, _ in pairs], [weight for _, weight in pairs])
        return (pair.up, pair.down.flatten(1)), others
    layer, weight = pairs[0]
    up, down = wide_alike(layer.up, layer.down)
    return (up, down.flatten(1) * (layer.scale * weight)), others


def _brought(layer: Layer | Placed, device: torch.device) -> Layer | Placed:
    there = all(tensor.device == device for tensor in layer.tensors())
    return layer if there else layer.map(lambda tensor: tensor.to(device))


@contextmanager
def reused_memory() -> Iterator[None]:
    """Let all sums in the block share pieces of memory for what they widen; fresh memory costs more than the sums."""
    _POOL.buffers = {}
    try:
        yield
    finally:
        del _POOL.buffers


def _borrow(purpose: str, shape: Sequence[int], like: Tensor) -> Tensor | None:
    """Float32 numbers beside a tensor, the same memory for each purpose; ``None`` where nothing is shared."""
    buffers: dict[tuple[str, torch.device], Tensor] | None = getattr(_POOL, "buffers", None)
    if buffers is None:
        return None
    key, count = (purpose, like.device), math.prod(shape)
    memory = buffers.get(key)
    if memory is None or memory.shape[0] < count:
        memory = buffers[key] = torch.empty(count, device=like.device)
    return memory[:count].view(shape)
