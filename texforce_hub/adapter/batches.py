"""A few layers at a time: enough for one batched call, little beside the files that they come from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from texforce_hub.adapter.value import Layer, LayerName

TOGETHER = 1 << 22
"""Numbers that are worth a call of their own."""

Some = TypeVar("Some", bound=Layer)
Item = TypeVar("Item")


def take_batches(layers: Iterable[tuple[LayerName, Some]]) -> Iterator[Mapping[LayerName, Some]]:
    """Layers together until they hold :data:`TOGETHER` numbers; one batch is dropped before the next."""
    for batch in take_together(layers, lambda item: count_numbers(item[1])):
        together = dict(batch)
        yield together
        together.clear()


def take_together(
    items: Iterable[Item], size_of: Callable[[Item], int], *, enough: float = TOGETHER
) -> Iterator[list[Item]]:
    """Items together until their sizes reach ``enough``; one batch is dropped before the next."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= enough:
            yield batch
            batch.clear()
            size = 0
    if batch:
        yield batch


def count_numbers(layer: Layer) -> int:
    """How many numbers a layer is stored as."""
    return sum(tensor.numel() for tensor in layer.tensors())
