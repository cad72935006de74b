"""What every kind of layer asks of its tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from texforce_hub.errors import AdapterError


def wide(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that sums safely: float64 stays, anything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_place(kind: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Refuse tensors of one layer that lie on different devices, or are no floating-point numbers.

    Raises:
        AdapterError: they do.
    """
    present = [t for t in tensors.values() if t is not None]
    if len({t.device for t in present}) > 1:
        raise AdapterError(f"{kind} with halves on different devices: {show_shapes(tensors)}; move them to one first")
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise AdapterError(f"{kind} with {name} of dtype {tensor.dtype}; expected a floating dtype")


def show_shapes(tensors: Mapping[str, Tensor | None]) -> str:
    """The tensors' shapes and devices in words, for an error."""
    return ", ".join(f"{name} {tuple(t.shape)} on {t.device}" for name, t in tensors.items() if t is not None)
