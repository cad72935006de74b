"""Sums of low-rank changes, many layers of one shape as one batch, known by the Gram matrices of their halves.

``Gu = upᵀ up`` and ``Gd = down downᵀ`` are rank × rank. Taken in float64 they give all inner products of the changes,
and the singular values and vectors of every weighted sum of them too: no dense change is formed, and nothing as
large as the halves is orthogonalised.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from texforce_hub.adapter.factors import Halves
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import square_of

#: Elements stacked for one batched call: enough to keep a device busy, little beside the layers themselves.
CHUNK = 1 << 20


class Sums:
    """Changes of ``b`` layers of one shape, ``n`` of each, side by side: ``Δᵢ = scaleᵢ · upᵢ @ downᵢ``.

    Shapes, ``k`` being the sum of the ``n`` ranks:
        up: ``(b, out, k)``    down: ``(b, k, in · kernel)``, float32 (float64 if any half is)
        scales: ``(b, n)``    up_gram, down_gram: ``(b, k, k)``, float64
        owner: ``(n, k)``, 1 where a direction belongs to a change
    """

    def __init__(self, layers: Sequence[Sequence[LowRank]]) -> None:
        self.dtype = sum_dtype(layers[0])
        layers = [[layer.of_some_rank() for layer in each] for each in layers]
        columns, owners = _distinct(list(zip(*layers, strict=True)))
        self.up = _side_by_side([[layer.up for layer in each] for each in columns], self.dtype, dim=2)
        self.down = _side_by_side([[layer.down.flatten(1) for layer in each] for each in columns], self.dtype, dim=1)
        device = self.up.device
        self.scales = torch.tensor([[x.scale for x in each] for each in layers], dtype=torch.float64, device=device)
        ranks = [each[0].rank for each in columns]
        rows = [[float(column == owner) for column, rank in enumerate(ranks) for _ in range(rank)] for owner in owners]
        self.owner = torch.tensor(rows, dtype=torch.float64, device=device)
        self.up_gram = square_of(self.up.double().mT)
        self.down_gram = square_of(self.down.double())

    def products(self) -> Tensor:
        """All inner products ``⟨Δᵢ, Δⱼ⟩`` (Frobenius) of each layer's changes, float64 ``(b, n, n)``."""
        sums: Tensor = self.owner @ (self.up_gram * self.down_gram) @ self.owner.mT
        return sums.mul_(self.scales[:, :, None]).mul_(self.scales[:, None, :])

    def weigh(self, coefficients: Tensor) -> Halves:
        """The sums ``Σᵢ cᵢ Δᵢ``; ``coefficients`` are ``(b, n)``, float64."""
        shares = (self.scales * coefficients) @ self.owner
        return Halves(self.up, self.down, self.up_gram, self.down_gram, shares)


def sum_dtype(layers: Iterable[LowRank]) -> torch.dtype:
    """What the layers' sum is computed in: float32, or float64 if any half is."""
    halves = (half.dtype for layer in layers for half in (layer.up, layer.down))
    return torch.float64 if torch.float64 in halves else torch.float32


def alike(groups: Iterable[Sequence[LowRank]]) -> Iterator[list[int]]:
    """The indices of groups whose layers have the same shapes, ranks, device and dtype, some at a time."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    size: dict[tuple[object, ...], int] = {}
    for index, layers in enumerate(groups):
        shapes = tuple((layer.up.shape, _width(layer)) for layer in layers)
        key: tuple[object, ...] = (shapes, layers[0].up.device, sum_dtype(layers))
        kinds.setdefault(key, []).append(index)
        size[key] = sum(layer.up.numel() + layer.down.numel() for layer in layers)
    for key, indices in kinds.items():
        step = max(1, CHUNK // max(1, size[key]))
        yield from (indices[start : start + step] for start in range(0, len(indices), step))


def _distinct(columns: Sequence[Sequence[LowRank]]) -> tuple[list[Sequence[LowRank]], list[int]]:
    """The columns of layers without those that repeat another's halves; for each, which of these it is."""
    kept: list[Sequence[LowRank]] = []
    owners: list[int] = []
    for column in columns:
        owner = next((i for i, other in enumerate(kept) if all(map(_same_halves, other, column))), len(kept))
        owners.append(owner)
        if owner == len(kept):
            kept.append(column)
    return kept, owners


def _same_halves(one: LowRank, other: LowRank) -> bool:
    return _same(one.up, other.up) and _same(one.down, other.down)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether they are alike for sure: nothing waits for a device."""
    return one is other or (one.device.type == "cpu" and one.dtype == other.dtype and torch.equal(one, other))


def _side_by_side(changes: Sequence[Sequence[Tensor]], dtype: torch.dtype, *, dim: int) -> Tensor:
    """Halves of ``b`` layers, those of each change in ``changes``, in one tensor: every number is moved once."""
    if len(changes) == 1 and len({half.dtype for half in changes[0]}) == 1:
        return torch.stack(list(changes[0])).to(dtype)
    ends = list(accumulate((halves[0].shape[dim - 1] for halves in changes), initial=0))
    shape = [len(changes[0]), *changes[0][0].shape]
    shape[dim] = ends[-1]
    together = torch.empty(shape, dtype=dtype, device=changes[0][0].device)
    for halves, start, end in zip(changes, ends, ends[1:]):
        for target, half in zip(together.narrow(dim, start, end - start), halves):
            target.copy_(half)
    return together


def _width(layer: LowRank) -> int:
    return math.prod(layer.down.shape[1:])
