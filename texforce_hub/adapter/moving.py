"""Tensors brought to another device together: packed into one piece of memory, by one copy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor


class HasTensors(Protocol):
    """A layer, as far as it is moved."""

    def tensors(self) -> Iterator[Tensor]:
        """Its tensors, in the order of :meth:`map`."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Any:
        """The same layer with every tensor passed through ``change``."""


Moved = TypeVar("Moved", bound=HasTensors)

_STEP = 16
"""Bytes: where a tensor may start in the piece, so that every dtype is aligned."""


def move_all(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on a device, in their order; those that lie there already are themselves.

    The others are views of one block, which stays as long as any of them does. A GPU's is filled from pinned memory:
    nothing waits for it.
    """
    if device.type not in ("cpu", "meta"):
        device = torch.empty(0, device=device).device  # "cuda" is the current one
    moved = list(tensors)
    sources: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.device != device:
            sources.setdefault(tensor.device, []).append(index)
    for source, indices in sources.items():
        if "meta" in (source.type, device.type) or len(indices) == 1:
            copies = [tensors[index].to(device) for index in indices]
        else:
            copies = _move_together([tensors[index] for index in indices], device)
        for index, copy in zip(indices, copies, strict=True):
            moved[index] = copy
    return moved


def read_numbers(tensors: Sequence[Tensor]) -> list[float]:
    """What tensors of one number each hold; a device is waited for once, however many lie there."""
    return [float(tensor) for tensor in move_all(tensors, torch.device("cpu"))]


def move_layers(layers: Mapping[str, Moved], device: torch.device) -> dict[str, Moved]:
    """The layers on a device, by one copy; those that lie there already are themselves."""
    tensors = [tensor for layer in layers.values() for tensor in layer.tensors()]
    if all(tensor.device == device for tensor in tensors):
        return dict(layers)
    moved = iter(move_all(tensors, device))
    return {name: layer.map(lambda _: next(moved)) for name, layer in layers.items()}


def _move_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    padded = [-(-size // _STEP) * _STEP for size in sizes]
    here, pinned = tensors[0].device, device.type == "cuda" and tensors[0].device.type == "cpu"
    block = torch.empty(sum(padded), dtype=torch.uint8, device=here, pin_memory=pinned)
    with torch.no_grad():
        for room, tensor, size in zip(torch.split(block, padded), tensors, sizes, strict=True):
            room[:size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    rooms = torch.split(block.to(device, non_blocking=pinned), padded)
    return [
        room[:size].view(tensor.dtype).view(tensor.shape)
        for room, tensor, size in zip(rooms, tensors, sizes, strict=True)
    ]
