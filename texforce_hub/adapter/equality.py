"""When two layers are the same: kind, numbers and every tensor's bits."""

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def same(a: Any, b: Any) -> bool:
    """Whether two layers, or two of their fields, hold the same; tensors by dtype, shape and bits, on any device."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same_bits(a, b)
    if is_dataclass(a) and type(a) is type(b):
        return all(same(getattr(a, entry.name), getattr(b, entry.name)) for entry in fields(a))
    return type(a) is type(b) and bool(a == b)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits; without numbers (``meta``), the former."""
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape or a.is_meta != b.is_meta:
        return False
    return a.is_meta or torch.equal(_bits(a), _bits(b.to(a.device)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
