"""Algebra on low-rank changes, exact and without ever forming a dense change.

A sum of low-rank changes is one low-rank change: stack the ups side by side, the downs on top of each other
(:func:`concat`). Its best approximation of a smaller rank (Eckart–Young) is found from the factors alone
(:func:`recompress`), and so are inner products (:func:`gram`). Everything runs where the tensors are;
layers of equal shape go through one batched call. Sums over ranks are taken in float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import wide
from texforce_hub.errors import MergeError

#: Elements stacked for one batched call: enough to keep a device busy, little beside the layers themselves.
_CHUNK = 1 << 21

Choice = Callable[[int, Tensor], int]


def concat(layers: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The exact weighted sum ``Σ wᵢ · scaleᵢ · upᵢ @ downᵢ``; its rank is the sum of the ranks.

    Scales and weights are folded into ``down``, so ``scale`` is 1. Float32 (float64 if any half is).

    Raises:
        MergeError: no layer, another number of weights than layers, or layers of different shapes.
    """
    if not layers or len(layers) != len(weights):
        raise MergeError(f"{len(layers)} layers and {len(weights)} weights; expected one weight for each of at least 1")
    check_one_shape(layers)
    dtype = torch.promote_types(*_wide_pair([half for layer in layers for half in (layer.up, layer.down)]))
    ups = [layer.up.to(dtype) for layer in layers]
    downs = [layer.down.to(dtype) * (layer.scale * weight) for layer, weight in zip(layers, weights)]
    return LowRank(torch.cat(downs), torch.cat(ups, dim=1))


def _wide_pair(halves: Sequence[Tensor]) -> tuple[torch.dtype, torch.dtype]:
    double = any(half.dtype == torch.float64 for half in halves)
    return torch.float32, torch.float64 if double else torch.float32


def check_one_shape(layers: Sequence[LowRank]) -> None:
    """Refuse layers that change weights of different shapes (:class:`MergeError`)."""
    shapes = list(dict.fromkeys(layer.shape for layer in layers))
    if len(shapes) > 1:
        raise MergeError(f"layers for weights of shapes {shapes[0]} and {shapes[1]}; expected one shape")


def gram(layers: Sequence[LowRank]) -> Tensor:
    """All inner products ``⟨Δᵢ, Δⱼ⟩`` (Frobenius) as one float64 matrix ``(n, n)``.

    ``⟨Δᵢ, Δⱼ⟩ = sᵢ sⱼ Σ (upᵢᵀ upⱼ) ∘ (downᵢ downⱼᵀ)``: products of rank × rank, never out × in.
    """
    check_one_shape(layers)
    up = torch.cat([layer.up.double() * layer.scale for layer in layers], dim=1)
    down = torch.cat([layer.down.double().flatten(1) for layer in layers])
    products = (up.T @ up) * (down @ down.T)
    owner = torch.repeat_interleave(
        torch.arange(len(layers), device=up.device), torch.tensor([layer.rank for layer in layers], device=up.device)
    )
    sums = products.new_zeros(len(layers), products.shape[1]).index_add_(0, owner, products)
    return sums.new_zeros(len(layers), len(layers)).index_add_(1, owner, sums)


def inner(a: LowRank, b: LowRank) -> float:
    """The inner product ``⟨Δa, Δb⟩`` of two changes of one shape."""
    return float(gram([a, b])[0, 1])


def norm(a: LowRank) -> float:
    """The Frobenius norm of a change."""
    return math.sqrt(max(0.0, float(gram([a])[0, 0])))


def singular_values(layers: Sequence[LowRank]) -> list[Tensor]:
    """Each change's singular values, largest first, float64, ``(min(out, rank),)`` or fewer."""
    values: list[Tensor] = [torch.empty(0)] * len(layers)
    for indices, factors in _batches(layers):
        for index, row in zip(indices, factors.values):
            values[index] = row[: min(layers[index].shape[0], row.numel(), _width(layers[index]))]
    return values


def recompress(
    layers: Sequence[LowRank], *, rank: int | Sequence[int] | None = None, energy: float | None = None
) -> list[tuple[LowRank, float]]:
    """The nearest changes of smaller rank, and the share of each change's energy (squared norm) they keep.

    With ``up = Q R`` (thin QR), the left singular vectors of the change are ``Q U`` with
    ``R (down downᵀ) Rᵀ = U S² Uᵀ``, a rank × rank problem; ``U`` projects ``R down`` exactly. Both halves
    carry ``√S``, so that small changes survive storage in half precision. Costs
    O((out + in) · rank²) and O((out + in) · rank) memory.

    Args:
        layers: changes of any shapes and ranks; those alike are computed as one batch.
        rank: the largest rank to keep, one for all or one each; ``None``: all that is not rounding noise.
        energy: keep the smallest rank whose share reaches this, in (0, 1].

    Returns:
        for each layer, in order: a layer of rank at least 1 and scale 1, and the kept share in [0, 1].

    Raises:
        MergeError: a rank below 1, an energy outside (0, 1].
    """
    if energy is not None and not 0 < energy <= 1:
        raise MergeError(f"energy {energy}; expected a share in (0, 1], e.g. 0.99")
    ranks = [rank] * len(layers) if rank is None or isinstance(rank, int) else list(rank)
    if any(r is not None and r < 1 for r in ranks):
        raise MergeError(f"rank {min(r for r in ranks if r is not None)}; expected at least 1")

    def choose(index: int, values: Tensor) -> int:
        return count_for(values, rank=ranks[index], energy=energy)

    return truncate(layers, choose)


def count_for(values: Tensor, *, rank: int | None, energy: float | None) -> int:
    """How many of the singular values a limit keeps: the smaller of what ``rank`` and ``energy`` allow."""
    keep = values.numel() if rank is None else min(rank, values.numel())
    if energy is not None and energy < 1:
        total = values.square().cumsum(0)
        keep = min(keep, int((total < energy * total[-1]).sum()) + 1)
    return max(1, keep)


def truncate(layers: Sequence[LowRank], choose: Choice) -> list[tuple[LowRank, float]]:
    """As :func:`recompress`, with the rank of layer ``i`` chosen by ``choose(i, its singular values)``.

    Values that are rounding noise beside the largest are never kept.
    """
    results: dict[int, tuple[LowRank, float]] = {}
    for indices, factors in _batches(layers):
        rows = list(factors.values.cpu())
        ranks = [min(choose(i, row), _significant(row, factors.up.dtype)) for i, row in zip(indices, rows)]
        ups, downs = factors.project(max(ranks))
        for i, row, r, up, down in zip(indices, rows, ranks, ups, downs):
            energy = row.square()
            total = float(energy.sum())
            share = float(energy[:r].sum()) / total if total > 0 else 1.0
            kernel = layers[i].down.shape[1:]
            results[i] = (LowRank(down[:r].reshape(r, *kernel).clone(), up[:, :r].clone()), min(1.0, share))
    return [results[i] for i in range(len(layers))]


class _Factors:
    """A batch of changes in factors: ``up = Q R``, ``R (down downᵀ) Rᵀ = U S² Uᵀ``; ``values`` are the S."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        self.up, triangle = torch.linalg.qr(up)
        self.down = triangle @ down
        wide_down = self.down.double()
        squares, directions = torch.linalg.eigh(wide_down @ wide_down.mT)
        self.values = squares.flip(-1).clamp_min(0).sqrt()
        self.directions = directions.flip(-1).to(up.dtype)

    def project(self, rank: int) -> tuple[Tensor, Tensor]:
        """The leading ``rank`` directions as balanced halves, ``(batch, out, rank)`` and ``(batch, rank, in)``."""
        directions = self.directions[..., :rank]
        down = directions.mT @ self.down
        root = down.double().norm(dim=-1, keepdim=True).sqrt().to(down.dtype)
        return self.up @ directions * root.mT, down / root.clamp_min(torch.finfo(down.dtype).tiny)


def _batches(layers: Sequence[LowRank]) -> Iterator[tuple[list[int], _Factors]]:
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        dtype = torch.promote_types(*_wide_pair((layer.up, layer.down)))
        groups.setdefault((layer.up.shape, _width(layer), layer.up.device, dtype), []).append(index)
    for indices in groups.values():
        first = layers[indices[0]]
        size = max(1, _CHUNK // max(1, first.up.numel() + first.down.numel()))
        for start in range(0, len(indices), size):
            chunk = indices[start : start + size]
            yield chunk, _factor([layers[i] for i in chunk])


def _factor(layers: Sequence[LowRank]) -> _Factors:
    dtype = torch.promote_types(*_wide_pair([half for layer in layers for half in (layer.up, layer.down)]))
    up = torch.stack([layer.up.to(dtype) for layer in layers])
    down = torch.stack([layer.down.to(dtype).flatten(1) * layer.scale for layer in layers])
    return _Factors(up, down)


def _width(layer: LowRank) -> int:
    return math.prod(layer.down.shape[1:])


def _significant(values: Tensor, dtype: torch.dtype) -> int:
    """How many singular values stand above the rounding of the halves they came from (at least 1)."""
    floor = max(8 * torch.finfo(dtype).eps, 1e-8) * float(values[0])
    return max(1, int((wide(values) > floor).sum()))
