"""A few layers at a time: enough for one batched call, little beside the files that they come from."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from texforce_hub.adapter.value import Layer, LayerName

TOGETHER = 1 << 22
"""Numbers that are worth a call of their own."""

Some = TypeVar("Some", bound=Layer)


def take_batches(
    layers: Iterable[tuple[LayerName, Some]], *, enough: float | None = None
) -> Iterator[Mapping[LayerName, Some]]:
    """Layers together until they hold ``enough`` numbers (:data:`TOGETHER`); one batch is dropped before the next."""
    most = TOGETHER if enough is None else enough
    batch: dict[LayerName, Some] = {}
    size = 0
    for name, layer in layers:
        batch[name] = layer
        size += count_numbers(layer)
        if size >= most:
            yield batch
            batch.clear()
            size = 0
    if batch:
        yield batch


def count_numbers(layer: Layer) -> int:
    """How many numbers a layer is stored as."""
    return sum(tensor.numel() for tensor in layer.tensors())
