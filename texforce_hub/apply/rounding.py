"""A change added to a weight and rounded once: to the nearest number or at random, and what it loses by that."""

import hashlib
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from texforce_hub.adapter.algebra import concat
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import wide
from texforce_hub.adapter.value import Layer
from texforce_hub.apply.placement import Placed

Term = tuple[Layer | Placed, float]
"""A change and its weight."""

_POOL = threading.local()
_BLOCK = 1 << 19
"""Bytes of float32 that are worked on at once: several such blocks fit into a processor's cache."""
_MEASURED = 4
"""Of so many blocks of rows, one is measured for what rounding loses: of a weight of 768 rows, a third of them."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Loss:
    """What rounding did to a change: the norm of the error and that of the change, of one parameter or of many."""

    error: float
    change: float

    @property
    def relative(self) -> float:
        """``‖(rounded − base) − change‖ / ‖change‖``; 0 for no change."""
        return self.error / self.change if self.change > 0 else 0.0


def total_loss(losses: Iterable[Loss]) -> Loss:
    """The loss of all parameters together."""
    of_parameters = list(losses)
    errors, changes = ([getattr(loss, side) for loss in of_parameters] for side in ("error", "change"))
    return Loss(math.hypot(*errors), math.hypot(*changes))


def measure_loss(base: Tensor, rounded: Tensor, change: Tensor) -> Loss:
    """What is lost of ``change`` (wide) where ``rounded`` stands for ``base + change``; all of one shape."""
    error = (wide(rounded) - wide(base)).sub_(change)
    return Loss(float(torch.linalg.vector_norm(error)), float(torch.linalg.vector_norm(change)))


def seed_for(seed: int, name: str) -> int:
    """The seed of one parameter's draws: from the run's seed and the name, so that no order matters."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def round_to(values: Tensor, dtype: torch.dtype, seed: int | None = None) -> Tensor:
    """The values in ``dtype``: to the nearest, or with a seed stochastically."""
    if seed is None:
        return values.to(dtype)
    return round_stochastically(values, dtype, torch.Generator().manual_seed(seed))


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each value as one of its two neighbours in ``dtype``, the nearer the likelier: right on average.

    Draws come from a CPU generator, so that they are the same on every device. Neighbours are found by their bit
    patterns, which count up with the magnitude in every floating dtype.
    """
    nearest = values.to(dtype)
    here = wide(nearest)
    error = wide(values) - here
    bits = nearest.view(_BITS[dtype.itemsize])
    outward = torch.where((error > 0) == (bits >= 0), bits + 1, bits - 1)
    across = torch.where(error > 0, 1, torch.iinfo(bits.dtype).min + 1)  # from zero, of either sign
    neighbour = torch.where(here == 0, across, outward).to(bits.dtype)
    chance = error / (wide(neighbour.view(dtype)) - here)
    draw = torch.rand(values.shape, generator=generator).to(values.device)
    return torch.where(draw < chance, neighbour, bits).view(dtype)


def summed(base: Tensor, terms: Sequence[Term], out: Tensor | None = None) -> Tensor:
    """``base + Σ weight · delta`` in float32, rounded once to the dtype of ``base``; runs on its device.

    ``out``, another tensor of the same shape and dtype, takes the result.
    """
    pair, others = _sorted_terms(base, terms)
    total = wide(base)
    if pair is not None:
        up, down = pair.up.to(total.dtype), pair.down.flatten(1).to(total.dtype)
        if out is not None and not others and out.dtype == total.dtype and out.is_contiguous():
            torch.addmm(total.flatten(1), up, down, out=out.view(out.shape[0], -1))
            return out
        total = torch.addmm(total.flatten(1), up, down).view(base.shape)
    for layer, weight in others:
        total = total + weight * layer.delta(base)
    return total.to(base.dtype) if out is None else out.copy_(total)


def _sorted_terms(base: Tensor, terms: Sequence[Term]) -> tuple[LowRank | None, list[Term]]:
    """The low-rank terms as one pair, and the others, on the device of ``base``."""
    moved = [(layer.map(lambda t: t.to(base.device)), weight) for layer, weight in terms]
    pairs = [(layer, weight) for layer, weight in moved if isinstance(layer, LowRank)]
    pair = concat([layer for layer, _ in pairs], [weight for _, weight in pairs]) if pairs else None
    return pair, [(layer, weight) for layer, weight in moved if not isinstance(layer, LowRank)]


def rounded_sum(
    base: Tensor, terms: Sequence[Term], seed: int | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`summed` for a ``base`` narrower than float32, and what the rounding lost of the change.

    The change is summed by itself first: it is never read back out of a sum that has swallowed it. The loss is
    measured while a block of rows is still in the processor's cache: over all numbers on a GPU, of a weight that is
    one block, and where it is rounded at random; else over every fourth block, which stand for the others.

    Returns:
        the sum, and ``(2,)`` squared norms of the error and of the change, float64, on the device of ``base``.
    """
    pair, others = _sorted_terms(base, terms)
    change = (
        torch.zeros(base.shape, device=base.device)
        if pair is None
        else _delta(pair, _borrow("change", base.numel(), base))
    )
    for layer, weight in others:
        change = change + weight * layer.delta(base)
    result = torch.empty_like(base) if out is None else out
    squares = torch.zeros(2, dtype=torch.float64, device=base.device)
    squares[1] = _squared_norm(change) if pair is None or others else _gram_norm(pair)
    if seed is not None:
        result.copy_(round_to(wide(base) + change, base.dtype, seed))
        squares[0] = _squared_norm((wide(result) - wide(base)).sub_(change))
        return result, squares
    rows, flat = _rows_in_cache(base), (base.shape[0], -1)
    errors, measured = list[Tensor](), 0
    count = 2 * rows * change[0].numel()
    room = _borrow("rows", count, change) if change.dtype == torch.float32 else None
    before, work = (change.new_empty(count) if room is None else room).view(2, rows, -1)
    old, added, new = base.reshape(flat), change.reshape(flat), result.view(flat)
    for start in range(0, len(base), rows):
        block = slice(start, start + rows)
        count = len(old[block])
        base_rows, total = before[:count].copy_(old[block]), work[:count]
        new[block].copy_(torch.add(base_rows, added[block], out=total))
        if start // rows % _MEASURED == 0:
            errors.append(torch.linalg.vector_norm(total.copy_(new[block]).sub_(base_rows).sub_(added[block])))
            measured += count
    squares[0] = torch.stack(errors).double().square().sum() * (len(base) / measured)
    return result, squares


def to_loss(squares: Sequence[float]) -> Loss:
    """The loss from the squared norms of error and change."""
    return Loss(*(math.sqrt(max(0.0, square)) for square in squares))


@contextmanager
def reused_memory() -> Iterator[None]:
    """Let all sums in the block share one piece of memory for their changes; fresh memory costs more than the sums."""
    _POOL.buffers = {}
    try:
        yield
    finally:
        del _POOL.buffers


def _borrow(purpose: str, count: int, like: Tensor) -> Tensor | None:
    """``(count,)`` float32 numbers beside a tensor, the same for each purpose; ``None`` where nothing is shared."""
    buffers: dict[tuple[str, torch.device], Tensor] | None = getattr(_POOL, "buffers", None)
    if buffers is None:
        return None
    key = (purpose, like.device)
    if key not in buffers or buffers[key].numel() < count:
        buffers[key] = torch.empty(count, device=like.device)
    return buffers[key][:count]


def _delta(pair: LowRank, memory: Tensor | None) -> Tensor:
    """The change of a pair that has its scale in its halves, in this memory if it is of its dtype."""
    up, down = wide(pair.up), wide(pair.down).flatten(1)
    if memory is None or up.dtype != memory.dtype:
        return (up @ down).view(pair.shape)
    return torch.mm(up, down, out=memory.view(up.shape[0], -1)).view(pair.shape)


def _squared_norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm.double().square()


def _gram_norm(pair: LowRank) -> Tensor:
    """The squared norm of a low-rank change, from products of rank × rank."""
    up, down = pair.up.double(), pair.down.double().flatten(1)
    return ((up.T @ up) * (down @ down.T)).sum()


def _rows_in_cache(base: Tensor) -> int:
    """How many rows of a weight are worked on at once: on a processor what its cache holds, elsewhere all."""
    if base.device.type != "cpu":
        return base.shape[0]
    return max(1, _BLOCK // max(1, 4 * base[0].numel()))
