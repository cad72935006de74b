"""A few layers at a time: enough for one batched call, little beside the files that they come from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch

from texforce_hub.adapter.lazy import LazyAdapter
from texforce_hub.adapter.value import Adapter, Layer, LayerName

TOGETHER = 1 << 22
"""Numbers that are worth a call of their own."""
TOGETHER_ON_DEVICE = 1 << 26
"""The same on a device, which is waited for once a batch."""

Some = TypeVar("Some", bound=Layer)
Item = TypeVar("Item")


def take_batches(
    layers: Iterable[tuple[LayerName, Some]], *, enough: float = TOGETHER
) -> Iterator[Mapping[LayerName, Some]]:
    """Layers together until they hold ``enough`` numbers; one batch is dropped before the next."""
    for batch in take_together(layers, lambda item: count_numbers(item[1]), enough=enough):
        together = dict(batch)
        yield together
        together.clear()


def take_together(
    items: Iterable[Item], size_of: Callable[[Item], int], *, enough: float = TOGETHER
) -> Iterator[list[Item]]:
    """Items together until the sum of their sizes is ``enough``; one batch is dropped before the next."""
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


def in_rounds(items: Iterable[Item], *, on_device: bool) -> Iterator[list[Item]]:
    """All items together where they lie on a device, which is then waited for once; else one by one."""
    if on_device:
        yield list(items)
    else:
        yield from ([item] for item in items)


def enough_for(content: Adapter | LazyAdapter, device: str | torch.device | None) -> int:
    """How many of an adapter's numbers go together if they are brought to ``device``, or stay where they are."""
    if device is not None:
        away = torch.device(device).type != "cpu"
    else:
        away = isinstance(content, Adapter) and lies_on_device(content.layers.values())
    return TOGETHER_ON_DEVICE if away else TOGETHER


def lies_on_device(layers: Iterable[Layer]) -> bool:
    """Whether any tensor of the layers lies elsewhere than in main memory."""
    return any(tensor.device.type != "cpu" for layer in layers for tensor in layer.tensors())


def count_numbers(layer: Layer) -> int:
    """How many numbers a layer is stored as."""
    return sum(tensor.numel() for tensor in layer.tensors())
