"""A layer that changes a part of a weight: some of its rows, or its first input channels."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import wide
from texforce_hub.adapter.value import Layer


@dataclass(frozen=True, slots=True)
class Block:
    """Where in a weight of ``shape`` a smaller layer lies: from row ``start`` on, from the first column on."""

    shape: tuple[int, ...]
    start: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """The change of a whole weight that a layer makes in one block of it; elsewhere zeros."""

    layer: Layer
    block: Block

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole weight."""
        return self.block.shape

    def delta(self, base: Tensor | None = None) -> Tensor:
        """The dense change of the whole weight, float32."""
        inner = self.layer.delta(None if base is None else self._within(base))
        whole = torch.zeros(self.shape, dtype=inner.dtype, device=inner.device)
        whole[self._bounds()] = inner
        return whole

    def tensors(self) -> Iterator[Tensor]:
        """The layer's tensors, in the order of :meth:`map`."""
        yield from self.layer.tensors()

    def map(self, change: Callable[[Tensor], Tensor]) -> "Placed":
        """The same with every tensor passed through ``change``."""
        return replace(self, layer=self.layer.map(change))

    def _bounds(self) -> tuple[slice, ...]:
        rows, *rest = self.layer.shape
        return (slice(self.block.start, self.block.start + rows), *(slice(0, size) for size in rest))

    def _within(self, weight: Tensor) -> Tensor:
        return weight[self._bounds()]


def place(layer: Layer, block: Block) -> LowRank | Placed:
    """A layer as a change of the whole weight around its block; a low-rank one stays low rank, its halves padded."""
    if not isinstance(layer, LowRank):
        return Placed(layer, block)
    up, down = layer.up, layer.down
    if up.shape[0] != block.shape[0]:
        above = up.new_zeros(block.start, layer.rank)
        below = up.new_zeros(block.shape[0] - block.start - up.shape[0], layer.rank)
        up = torch.cat([above, up, below])
    if down.shape[1:] != block.shape[1:]:
        padded = wide(down).new_zeros(layer.rank, *block.shape[1:])
        padded[:, : down.shape[1]] = down
        down = padded.to(down.dtype)
    return replace(layer, up=up, down=down)
