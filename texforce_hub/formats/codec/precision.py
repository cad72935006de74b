"""A layer's tensors in a file's dtype: what is lost because numbers are too small for it is avoided, or refused."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from texforce_hub.adapter.tensors import holds_numbers, narrow, wide
from texforce_hub.errors import AdapterError
from texforce_hub.files.dtypes import FRACTIONAL
from texforce_hub.files.torch_dtypes import DTYPES
from texforce_hub.formats.codec.roles import Part

_DTYPES = tuple(DTYPES[name] for name in FRACTIONAL)
"""Those with a sign and a fraction that files can have."""

_SMALL = (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Those whose smallest numbers are far above those of float32, in which they are computed with."""

_OWN = ("dora", "magnitude")
"""Roles that no other tensor's factor can move into."""


def fit_dtype(parts: Sequence[Part], dtype: torch.dtype | None, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every part times its factor, by role, contiguous, in ``dtype`` (``None``: its own), rounded once.

    A dtype loses what is below its smallest normal number. Where that happens, the tensors whose product the change
    is are brought to one size by powers of two, which round nothing themselves.

    Raises:
        AdapterError: a dtype that a layer's numbers cannot have, a finite value that is too large for it, or more
            than the dtype's ``eps`` of the change would be lost to underflow; everything, at worst.
    """
    product = [part for part in parts if part[0] not in (*_OWN, "alpha")]
    yield from _store_product(product, dtype, name).items()
    for role, tensor, factor in parts:
        if role in _OWN:
            yield from _store_product([(role, tensor, factor)], dtype, name).items()
        elif role == "alpha":
            yield role, tensor


def _store_product(parts: Sequence[Part], dtype: torch.dtype | None, name: str) -> dict[str, Tensor]:
    with suppress(AdapterError):  # too large as it is: shared, it may fit
        plain = _round(parts, dtype, name)
        if all(_missing(tensor, factor, plain[role]) is None for role, tensor, factor in parts):
            return plain
    shared = _share(parts)
    stored = _round(shared, dtype, name)
    narrowest = min((tensor.dtype for tensor in stored.values()), key=lambda kind: torch.finfo(kind).bits)
    most = torch.finfo(narrowest).eps
    lost = _underflow(shared, stored) if _most_underflow(shared, stored) > most else 0.0
    if not lost <= most:
        raise AdapterError(
            f"{name}: {lost:.0%} of its change would be lost, its numbers are too small for {narrowest}; "
            "widen it, --dtype float16 or wider"
        )
    return stored


def _round(parts: Sequence[Part], dtype: torch.dtype | None, name: str) -> dict[str, Tensor]:
    return {role: _multiply(tensor, factor, dtype or tensor.dtype, name) for role, tensor, factor in parts}


def _multiply(tensor: Tensor, factor: float, dtype: torch.dtype, name: str) -> Tensor:
    if dtype not in _DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise AdapterError(f"{name}: cannot be written as {dtype}; expected one of {known}")
    product = tensor.detach() if factor == 1.0 else factor * wide(tensor.detach())
    if not tensor.is_meta and factor != 1.0 and not holds_numbers(product) and holds_numbers(tensor):
        raise AdapterError(f"{name}: values times {factor:g} do not fit {product.dtype}; make the scale smaller")
    return narrow(product, dtype, name).contiguous()


def _share(parts: Sequence[Part]) -> list[Part]:
    """The same product with factors that make the largest numbers of all its tensors alike, to a power of two."""
    sizes = [abs(factor) * _peak(tensor) for _, tensor, factor in parts]
    if not all(0 < size < math.inf for size in sizes):
        return list(parts)
    logs = [math.log2(size) for size in sizes]
    shifts = [round(sum(logs) / len(logs) - log) for log in logs]
    shifts[0] -= sum(shifts)
    return [
        (role, tensor, math.ldexp(factor, shift)) for (role, tensor, factor), shift in zip(parts, shifts, strict=True)
    ]


def _peak(tensor: Tensor) -> float:
    return float(wide(tensor.detach()).abs().max()) if tensor.numel() and not tensor.is_meta else 0.0


def _most_underflow(parts: Sequence[Part], stored: Mapping[str, Tensor]) -> float:
    """What :func:`_underflow` is at most, as if every number had lost the smallest one that its dtype has.

    Known from the sizes of the ranks alone; infinity where that says nothing.
    """
    if not all(tensor.dtype in _SMALL for tensor in stored.values()):
        return math.inf  # float32's own smallest numbers are no larger
    size, lost = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    for role, tensor, factor in parts:
        ranks = _by_rank(role, tensor.detach() if tensor.element_size() > 1 else wide(tensor.detach()))
        norm = torch.linalg.vector_norm(ranks, dim=1, dtype=torch.float64)
        facts = torch.finfo(stored[role].dtype)
        smallest = facts.smallest_normal * facts.eps / (abs(factor) or math.inf)
        size = size * norm.to(size.device)
        lost = lost + smallest * math.sqrt(ranks.shape[1]) / norm.clamp(min=2**-100).to(size.device)
    total = float(torch.linalg.vector_norm(size))
    return float(torch.linalg.vector_norm(lost * size)) / total if 0 < total < math.inf else math.inf


def _underflow(parts: Sequence[Part], stored: Mapping[str, Tensor]) -> float:
    """The share of a product that its stored tensors lack because they underflowed: 0, if nothing did, to about 1.

    The ranks of a low-rank change are weighed by their own size: one may be small in ``down`` and large in ``up``.
    """
    missing = {role: _missing(tensor, factor, stored[role]) for role, tensor, factor in parts}
    if all(error is None for error in missing.values()):
        return 0.0
    lost, size = 0.0, 1.0  # of each rank
    for role, tensor, _ in parts:
        error, scale = missing[role], _peak(tensor) or 1.0
        norm = torch.linalg.vector_norm(_by_rank(role, wide(tensor) / scale), dim=1)
        size = size * norm
        if error is not None:
            lost = lost + torch.linalg.vector_norm(_by_rank(role, error / scale), dim=1) / norm.clamp(min=2**-100)
    total = float(torch.linalg.vector_norm(size))
    return float(torch.linalg.vector_norm(lost * size)) / total if total else 0.0


def _missing(tensor: Tensor, factor: float, stored: Tensor) -> Tensor | None:
    """What ``stored / factor`` has more than ``tensor`` where it is below its dtype's normal numbers, if anything."""
    if tensor.is_meta or factor == 0 or (abs(factor) == 1 and stored.dtype == tensor.dtype):
        return None
    mantissa, exponent = math.frexp(factor)
    numbers = wide(stored)
    if abs(mantissa) == 0.5 and torch.equal(numbers, factor * wide(tensor.detach())):
        return None  # a power of two rounds nothing but what underflows
    small = numbers.abs() < torch.finfo(stored.dtype).smallest_normal
    error = numbers * math.ldexp(1.0, min(-exponent, 127)) / mantissa - wide(tensor.detach())
    error = torch.where(small, error, 0.0)
    return error if bool(error.any()) else None


def _by_rank(role: str, tensor: Tensor) -> Tensor:
    """The numbers of each rank as one row; of anything but low rank, all as one."""
    if role == "down":
        return tensor.flatten(1)
    return tensor.flatten(1).T if role == "up" else tensor.reshape(1, -1)
