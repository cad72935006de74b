"""Singular values and vectors of batches of changes ``up @ down``: from Gram matrices; by QR where these do not tell.

Let ``Gu = upᵀ up`` with columns evened to length 1, ``Gd = down downᵀ`` with the lengths moved there, and ``R`` any
matrix with ``Rᵀ R = Gu``. Then ``R Gd Rᵀ = V S² Vᵀ`` gives the singular values ``S``; the rows ``Vᵀ R down / S`` are
the right vectors, and the change times them the left ones, times ``S``. ``R`` is Cholesky's triangle and is never
inverted: halves that lean on each other, or repeat each other, cost no precision.

That Cholesky succeeds, :data:`_SHIFT` is added to the diagonal: to ``Gu`` that is what rounding is. A direction in
which ``up`` vanishes gets by it a singular value of up to ``√_SHIFT ‖down‖``. That is rounding noise (:data:`NOISE`) as
long as the largest is no smaller than :data:`_FADED` of ``‖down‖``: it is smaller only where terms nearly cancel. Where
they do and there are such directions, and for float64 halves, ``up`` is orthogonalised.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from texforce_hub.adapter.moving import move_all
from texforce_hub.adapter.tensors import eigh

NOISE = 8 * torch.finfo(torch.float32).eps
"""Singular values below this share of the largest are rounding of float32 halves."""
_NOISE_OF_WIDE = 1e-8  # the same of float64 halves
_SHIFT = 64 * torch.finfo(torch.float64).eps
_FADED = 1 / 4  # √_SHIFT / _FADED is half of NOISE
_GENTLE = 1 / 8  # the least pivot with which products with ``up`` lose nothing in float32
_STEEP = 1e-4  # the least pivot of Cholesky's triangle, of columns of length 1, that shows that none vanish


class Halves(NamedTuple):
    """A batch's halves and their Gram matrices.

    Shapes:
        up: ``(b, out, k)``    down: ``(b, k, in · kernel)``, float32 or float64, as the results are
        up_gram, down_gram: ``(b, k, k)``, float64    shares: ``(b, k)``, float64, factors of the rank-1 terms
    """

    up: Tensor
    down: Tensor
    up_gram: Tensor
    down_gram: Tensor
    shares: Tensor

    def pick(self, rows: list[int]) -> "Halves":
        """Some of the changes."""
        return Halves(*(tensor[rows] for tensor in self))


class Factors(NamedTuple):
    """The singular values ``(b, k)`` of a batch of changes, largest first, float64, and the way to their vectors.

    The values lie in main memory. Those below ``noise`` times the largest are rounding of the halves.
    """

    values: Tensor
    noise: float
    by_gram: "_ByGram | None"
    by_qr: "_ByQr | None"
    hard: list[int]

    def project(self, rank: int) -> tuple[Tensor, Tensor]:
        """The leading ``rank`` directions as balanced halves, ``(b, out, rank)`` and ``(b, rank, in · kernel)``."""
        if self.by_gram is None or self.by_qr is None:
            factors = self.by_gram or self.by_qr
            assert factors is not None
            return factors.project(rank)
        up, down = self.by_gram.project(rank)
        columns, rows = self.by_qr.project(rank)
        up[self.hard], down[self.hard] = columns, rows
        return up, down


def factor(batches: Sequence[Halves]) -> list[Factors]:
    """Each batch of changes in factors; a device is waited for once, and once more for each with layers that cancel."""
    plain = [None if halves.up.dtype == torch.float64 else _ByGram(halves) for halves in batches]
    numbers = [torch.cat([each.values, each.pivots[:, None]], 1) for each in plain if each is not None]
    read = iter(move_all(numbers, torch.device("cpu")))
    return [_factor(halves, gram, None if gram is None else next(read)) for halves, gram in zip(batches, plain)]


def _factor(halves: Halves, by_gram: "_ByGram | None", numbers: Tensor | None) -> Factors:
    if by_gram is None or numbers is None:
        by_qr = _ByQr(halves)
        return Factors(by_qr.values.cpu(), _NOISE_OF_WIDE, None, by_qr, list(range(len(halves.up))))
    values, pivots = numbers[:, :-1], numbers[:, -1]
    hard = (pivots <= 0).nonzero()[:, 0].tolist()
    by_gram.dtype = torch.float32 if bool((pivots > _GENTLE).all()) else torch.float64
    if not hard:
        return Factors(values, NOISE, by_gram, None, hard)
    by_qr = _ByQr(halves.pick(hard))
    values[hard] = by_qr.values.cpu()
    return Factors(values, NOISE, by_gram, by_qr, hard)


class _ByGram:
    """By the Gram matrices of the halves.

    pivots: ``(b,)``, the least ones of Cholesky's triangles; 0 where the matrices do not tell all
    dtype: in which the halves are multiplied
    """

    def __init__(self, halves: Halves) -> None:
        self.halves, self.dtype = halves, torch.float64
        lengths = halves.up_gram.diagonal(dim1=1, dim2=2).sqrt()
        zero = lengths == 0
        self.lengths = lengths.masked_fill(zero, 1.0)
        # A column of zeros stands for a unit vector here, and counts for nothing.
        even = halves.up_gram / _outer(self.lengths) + torch.diag_embed(zero.double() + _SHIFT)
        self.weights = halves.shares.masked_fill(zero, 0.0) * self.lengths
        self.down_gram = halves.down_gram * _outer(self.weights)
        lower, failed = torch.linalg.cholesky_ex(even)
        self.triangle = lower.mT
        squares, directions = eigh(self.triangle @ self.down_gram @ self.triangle.mT)
        self.values = squares.flip(-1).clamp_min(0).sqrt()
        self.directions = directions.flip(-1)
        size = self.down_gram.abs().sum(-1).amax(-1)  # at least ‖down‖²
        pivots = lower.diagonal(dim1=1, dim2=2).amin(1)
        told = (failed == 0) & ((pivots > _STEEP) | (squares[:, -1] >= _FADED**2 * size))
        self.pivots = torch.where(told, pivots, 0.0)

    def project(self, rank: int) -> tuple[Tensor, Tensor]:
        root = self.values[:, :rank].sqrt()
        inverse = torch.where(root > 0, 1 / root, 0)
        rows = self.directions[..., :rank].mT @ self.triangle
        columns = self.down_gram @ rows.mT * inverse[:, None, :] ** 3 / self.lengths[:, :, None]
        rows = rows * self.weights[:, None, :] * inverse[:, :, None]
        up, down = (half.to(self.dtype) for half in self.halves[:2])
        up = (columns.mT.to(self.dtype) @ up.mT).mT  # twice as fast as up @ columns, which are few
        return up.to(self.halves.up.dtype), (rows.to(self.dtype) @ down).to(self.halves.up.dtype)


class _ByQr:
    """``up = Q R`` (thin QR), ``R (down downᵀ) Rᵀ = V S² Vᵀ``, left vectors ``Q V``; zeros up to ``k`` of each."""

    def __init__(self, halves: Halves) -> None:
        self.dtype, self.count = halves.up.dtype, halves.up.shape[-1]
        self.up, triangle = torch.linalg.qr(halves.up.double())
        self.down = triangle @ (halves.down.double() * halves.shares[:, :, None])
        squares, directions = eigh(self.down @ self.down.mT)
        self.values = self._pad(squares.flip(-1).clamp_min(0).sqrt())
        self.directions = self._pad(directions.flip(-1))

    def project(self, rank: int) -> tuple[Tensor, Tensor]:
        directions = self.directions[..., :rank]
        down = directions.mT @ self.down
        root = down.norm(dim=-1, keepdim=True).sqrt()
        up = self.up @ directions * root.mT
        return up.to(self.dtype), (down / root.clamp_min(torch.finfo(down.dtype).tiny)).to(self.dtype)

    def _pad(self, columns: Tensor) -> Tensor:
        return nn.functional.pad(columns, (0, self.count - columns.shape[-1]))


def _outer(factors: Tensor) -> Tensor:
    return factors[:, :, None] * factors[:, None, :]
