"""Sums of low-rank changes, many layers of one shape as one batch, known by the Gram matrices of their halves.

``Gu = upᵀ up`` and ``Gd = down downᵀ`` are rank × rank. Taken in float64 they give all inner products of the changes,
and the singular values and vectors of every weighted sum of them too: no dense change is formed, and nothing as
large as the halves is orthogonalised.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import eigh

#: Elements stacked for one batched call: enough to keep a device busy, little beside the layers themselves.
CHUNK = 1 << 20

#: How much longer than ``up`` the inverse of its triangle may be (‖R⁻¹‖ / √k, columns of ``up`` at length 1).
#: A float64 Gram matrix loses its square, 10⁸ of 10¹⁶: orthonormal vectors come out exact to float32's rounding.
_STEEPEST = 1e4
#: Up to here products with ``up`` lose nothing in float32 either.
_GENTLE = 8.0


class Factors(Protocol):
    """The singular values ``(b, k)`` of a batch of changes, largest first, float64, and the way to their vectors.

    Values below ``noise`` times the largest are rounding of the halves.
    """

    values: Tensor
    noise: float

    def project(self, rank: int) -> tuple[Tensor, Tensor]:
        """The leading ``rank`` directions as balanced halves, ``(b, out, rank)`` and ``(b, rank, in · kernel)``."""


class Sums:
    """Changes of ``b`` layers of one shape, ``n`` of each, side by side: ``Δᵢ = scaleᵢ · upᵢ @ downᵢ``.

    Shapes, ``k`` being the sum of the ``n`` ranks:
        up: ``(b, out, k)``    down: ``(b, k, in · kernel)``, float32 (float64 if any half is)
        scales: ``(b, n)``    up_gram, down_gram: ``(b, k, k)``, float64
        owner: ``(n, k)``, 1 where a direction belongs to a change
    """

    def __init__(self, layers: Sequence[Sequence[LowRank]]) -> None:
        dtype = sum_dtype(layers[0])
        self.up = _side_by_side([[layer.up for layer in each] for each in zip(*layers)], dtype, dim=2)
        self.down = _side_by_side([[layer.down.flatten(1) for layer in each] for each in zip(*layers)], dtype, dim=1)
        device = self.up.device
        self.scales = torch.tensor([[x.scale for x in each] for each in layers], dtype=torch.float64, device=device)
        ranks = torch.tensor([layer.rank for layer in layers[0]], device=device)
        owners = torch.repeat_interleave(torch.arange(len(ranks), device=device), ranks)
        self.owner = (owners == torch.arange(len(ranks), device=device)[:, None]).double()
        wide = self.up.double()
        self.up_gram = wide.mT @ wide
        wide = self.down.double()
        self.down_gram = wide @ wide.mT

    def products(self) -> Tensor:
        """All inner products ``⟨Δᵢ, Δⱼ⟩`` (Frobenius) of each layer's changes, float64 ``(b, n, n)``."""
        sums: Tensor = self.owner @ (self.up_gram * self.down_gram) @ self.owner.mT
        return sums.mul_(self.scales[:, :, None]).mul_(self.scales[:, None, :])

    def factor(self, coefficients: Tensor) -> Iterator[tuple[list[int], Factors]]:
        """The sums ``Σᵢ cᵢ Δᵢ`` in factors; ``coefficients`` are ``(b, n)``, float64.

        Yields the indices of some layers and their factors: those whose Gram matrices tell all come together, the
        rest (halves that repeat each other, float64) are factored by QR.
        """
        shares = (self.scales * coefficients) @ self.owner
        lengths = self.up_gram.diagonal(dim1=1, dim2=2).sqrt()
        none = lengths == 0
        lengths = lengths.masked_fill(none, 1.0)
        shares = shares.masked_fill(
            none, 0.0
        )  # a column of zeros stands for a unit vector below, and counts for nothing
        # Columns of length 1, so that it does not matter how a change is divided between its halves.
        even = self.up_gram / (lengths[:, :, None] * lengths[:, None, :]) + torch.diag_embed(none.double())
        lower, failed = torch.linalg.cholesky_ex(even)
        identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False).mT
        steepness = inverse.flatten(1).norm(dim=1) / math.sqrt(lower.shape[-1])
        told = (failed == 0) & (steepness <= _STEEPEST) & (self.up.dtype != torch.float64)
        easy, hard = ([index for index, gram in enumerate(told.tolist()) if gram is kind] for kind in (True, False))
        if easy:
            halves = _Halves(self.up, self.down, self.down_gram, lower.mT, inverse, lengths, shares)
            yield easy, _ByGram(halves if not hard else halves.pick(easy), float(steepness[told].max()))
        if hard:
            yield (
                hard,
                _ByQr(self.up[hard].double(), self.down[hard].double() * shares[hard][:, :, None], self.up.dtype),
            )


class _Halves(NamedTuple):
    """A batch's halves, the Gram matrix of ``down``, the triangle of ``up`` at even lengths, and what was evened."""

    up: Tensor
    down: Tensor
    down_gram: Tensor
    triangle: Tensor
    inverse: Tensor
    lengths: Tensor
    shares: Tensor

    def pick(self, layers: list[int]) -> "_Halves":
        return _Halves(*(tensor[layers] for tensor in self))


class _ByGram:
    """``up = Q R`` by Cholesky's ``Gu = Rᵀ R``, never forming Q; ``R Gd Rᵀ = V S² Vᵀ``, left vectors ``up R⁻¹ V``."""

    def __init__(self, halves: _Halves, steepness: float) -> None:
        self.halves = halves
        self.dtype = halves.up.dtype if steepness <= _GENTLE else torch.float64
        self.right = halves.triangle * (halves.lengths * halves.shares)[:, None, :]
        squares, directions = eigh(self.right @ halves.down_gram @ self.right.mT)
        self.values = squares.flip(-1).clamp_min(0).sqrt()
        self.noise = _noise(halves.up.dtype)
        self.directions = directions.flip(-1)

    def project(self, rank: int) -> tuple[Tensor, Tensor]:
        root = self.values[:, :rank].sqrt()
        directions = self.directions[..., :rank]
        left = (self.halves.inverse @ directions) * root[:, None, :] / self.halves.lengths[:, :, None]
        right = directions.mT @ self.right * torch.where(root > 0, 1 / root, 0)[:, :, None]
        up = self.halves.up.to(self.dtype) @ left.to(self.dtype)
        down = right.to(self.dtype) @ self.halves.down.to(self.dtype)
        return up.to(self.halves.up.dtype), down.to(self.halves.up.dtype)


class _ByQr:
    """``up = Q R`` (thin QR), ``R (down downᵀ) Rᵀ = V S² Vᵀ``, left vectors ``Q V``; halves in float64."""

    def __init__(self, up: Tensor, down: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.up, triangle = torch.linalg.qr(up)
        self.down = triangle @ down
        squares, directions = eigh(self.down @ self.down.mT)
        self.values = squares.flip(-1).clamp_min(0).sqrt()
        self.noise = _noise(dtype)
        self.directions = directions.flip(-1)

    def project(self, rank: int) -> tuple[Tensor, Tensor]:
        directions = self.directions[..., :rank]
        down = directions.mT @ self.down
        root = down.norm(dim=-1, keepdim=True).sqrt()
        up = self.up @ directions * root.mT
        return up.to(self.dtype), (down / root.clamp_min(torch.finfo(down.dtype).tiny)).to(self.dtype)


def _noise(dtype: torch.dtype) -> float:
    return max(8 * torch.finfo(dtype).eps, 1e-8)


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
