"""What every kind of layer asks of its tensors."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from texforce_hub.errors import AdapterError

_LARGE = 128
"""Rows from which on a square matrix is worth being computed in parts."""


def wide(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that sums safely: float64 stays, anything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def wide_alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dtype that sums safely: float64 if any of them is, else float32."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)


def square_of(rows: Tensor) -> Tensor:
    """``rows @ rowsᵀ`` of one or more ``(…, k, n)``; where it is large only a little more than half is computed."""
    size = rows.shape[-2]
    if size < _LARGE:
        return rows @ rows.mT
    result = rows.new_empty(*rows.shape[:-1], size)
    step = -(-size // 4)
    for start in range(0, size, step):
        end = min(start + step, size)
        result[..., start:end, start:] = rows[..., start:end, :] @ rows[..., start:, :].mT
        result[..., end:, start:end] = result[..., start:end, end:].mT
    return result


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, smallest first, and eigenvectors of symmetric matrices ``(…, k, k)``.

    Raises:
        AdapterError: the matrix holds infinity or NaN: the values that it was made of are too large to be multiplied.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # it is there
        raise AdapterError("products of its values overflow; the training broke down or the file is damaged") from error
    return values, vectors


def narrow(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another dtype, rounded once; ``name`` is for the error.

    Raises:
        AdapterError: a finite value too large for the dtype; torch would make it infinite, or silently the largest
            fp8 number.
    """
    if not tensor.is_meta and tensor.dtype != dtype and not _peak(tensor) < _overflow(dtype):
        size = wide(tensor).abs()
        if bool((torch.isfinite(size) & (size >= _overflow(dtype))).any()):
            raise AdapterError(f"{name}: values up to {size.max():.3g} do not fit {dtype}; widen it")
    return tensor.to(dtype)


def holds_numbers(tensor: Tensor) -> bool:
    """Whether every entry is finite; a tensor without entries is."""
    return math.isfinite(_peak(tensor))


def all_hold_numbers(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether every entry of each is finite; a device is waited for once, whatever lies there."""
    sound = [True] * len(tensors)
    elsewhere: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.device.type == "cpu":
            sound[index] = math.isfinite(_peak(tensor))
        elif tensor.numel():
            elsewhere.setdefault(tensor.device, []).append(index)
    for indices in elsewhere.values():
        ends = [end.double() for index in indices for end in _ends(tensors[index])]
        finite = torch.stack(ends).isfinite().view(-1, 2).all(1).tolist()
        for index, answer in zip(indices, finite, strict=True):
            sound[index] = answer
    return sound


def _peak(tensor: Tensor) -> float:
    """The largest magnitude, NaN if there is one: the extremes are found in one pass, without a wider copy."""
    if tensor.numel() == 0:
        return 0.0
    least, most = map(float, _ends(tensor))
    return math.nan if math.isnan(least) else max(-least, most)


def _ends(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest entry; both NaN if there is one."""
    ends = torch.aminmax(tensor.detach() if tensor.element_size() > 1 else tensor.detach().float())
    return ends.min, ends.max


def _overflow(dtype: torch.dtype) -> float:
    """Half a step beyond the largest number: from there on IEEE 754 rounds to infinity."""
    facts = torch.finfo(dtype)
    return facts.max + math.ldexp(facts.eps, math.frexp(facts.max)[1] - 2)


def check_tensors(kind: str, tensors: Mapping[str, Tensor | None]) -> None:
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
