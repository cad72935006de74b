"""The nearest change of a smaller rank to one stored in full: exactly, or by a random projection with a proven bound.

A random projection (Halko, Martinsson, Tropp, arXiv 0909.4061) finds an orthonormal ``Q`` near the change's column
space. What it misses is known afterwards, exactly: ``ρ² = ‖Δ‖² − ‖QᵀΔ‖²``. By Ky Fan's inequality the best change of
any rank keeps at most ``ρ²`` more energy (squared norm) than the one found inside ``Q``. Where ``ρ²`` is below
:data:`MISSED` of the whole the projection is taken.

A change of full rank has much energy outside of any ``Q``, and yet its leading directions can be found: in a block
Krylov space (Musco, Musco, arXiv 1504.05477) of ``G = Δ Δᵀ``. Let ``V`` be its leading Ritz vectors, ``θ₁ ≥ θ₂ …``
their values, ``E = G V − V Θ`` what they miss, and ``H`` what ``G`` is between the directions orthogonal to ``V``. That
``H`` lies below ``θₖ − δ`` is proven by a Cholesky decomposition of ``(θₖ − δ) I − H``, which exists only then. By
Young's inequality ``G``, which is ``[Θ Eᵀ; E H]``, is at most ``[Θ + EᵀE/δ, 0; 0, H + δ I]``, and ``H + δ I`` at most
``θₖ``. So, again by Ky Fan, the best change of rank ``k`` keeps at most ``‖E‖²/δ`` more energy than the one inside
``V``. Where that is below :data:`MISSED` of the whole it is taken; only where it is not, all singular values are
computed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from texforce_hub.adapter.low_rank import LowRank

MISSED = 1e-8
"""The share of a change's energy by which a projected result may fall short of the best one of its rank."""
_SPARE = 10  # directions beyond the rank asked for: what a projection needs to be sure of the last ones
_BLOCK, _LARGEST, _BETWEEN = 16, 24, 8  # of the Krylov space: its vectors a power, powers, powers between two looks
_NOISE = 8 * torch.finfo(torch.float32).eps  # of the largest singular value: rounding of float32 weights


def truncate_dense(
    change: Tensor, choose: Callable[[Tensor], int], *, expected: int | None = None
) -> tuple[LowRank, float]:
    """The change at the rank that ``choose`` gives for its singular values, and the share of its energy kept.

    Args:
        change: ``(out, in, *kernel)``, any floating dtype; worked on in float64.
        choose: a rank for the singular values, largest first; of a projection they are the leading
            ones, and then the rest of the energy as one more.
        expected: the largest rank that may be chosen: a projection of a little more is tried first.

    Returns:
        halves in float32 that carry ``√S`` each, and a share in [0, 1].
    """
    flat = change.double().flatten(1)
    total = float(flat.square().sum())
    left, values, right = _leading(flat, expected) or _decompose(flat, expected)
    limit = max(1, int((values > _NOISE * values[:1]).sum()))
    rank = min(choose(_with_rest(values.cpu(), total, min(flat.shape))), limit)
    root = values[:rank].sqrt()
    share = float(values[:rank].square().sum()) / total if total > 0 else 1.0
    down = (root[:, None] * right[:rank]).float().reshape(rank, *change.shape[1:])
    return LowRank(down, (left[:, :rank] * root).float()), min(1.0, share)


def _with_rest(values: Tensor, total: float, count: int) -> Tensor:
    """The singular values, and where they are not all ``count`` of them the rest of the energy as one more."""
    if len(values) == count:
        return values
    rest = max(0.0, total - float(values.square().sum()))
    return torch.cat([values, values.new_tensor([rest]).sqrt()])


def _leading(flat: Tensor, expected: int | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """More than ``expected`` leading singular triplets, or ``None`` where no bound proves that they are."""
    if expected is None:
        return None
    return _project(flat, expected + _SPARE) or _search(flat, expected)


def _project(flat: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The leading singular triplets inside a random projection, or ``None`` if it misses too much."""
    if size >= min(flat.shape) // 2:
        return None
    draw = torch.randn(flat.shape[1], size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(flat @ draw.to(flat.device))[0]
    basis = torch.linalg.qr(flat @ (flat.mT @ basis))[0]  # once more: what is small beside the rest gets smaller
    inside = basis.mT @ flat
    total = flat.square().sum()
    if bool(total - inside.square().sum() > MISSED * total):
        return None
    left, values, right = torch.linalg.svd(inside, full_matrices=False)
    return basis @ left, values, right


def _search(flat: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The leading singular triplets inside a Krylov space, or ``None`` if it may miss too much."""
    tall = flat.shape[0] > flat.shape[1]
    short = flat.mT if tall else flat
    count = rank + _SPARE
    if len(short) < 3 * _BLOCK * _LARGEST or 4 * count > _BLOCK * _LARGEST:  # all of them are as soon computed
        return None
    gram = short @ short.mT
    space = _Krylov(gram)
    for _ in range(_LARGEST // _BETWEEN):
        space.grow()
        near, squares, error = space.leading(count)
        gap = (squares[rank - 1] - squares[-1]) / 2
        if bool(error.square().sum() <= MISSED * gram.trace() * gap):
            break
    else:
        return None
    scaled = near * squares
    rest = gram - scaled @ near.mT - error @ near.mT - near @ error.mT
    edge = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (squares[rank - 1] - gap)
    if bool(torch.linalg.cholesky_ex(edge - rest).info):
        return None
    values = squares.clamp_min(0).sqrt()
    far = (near.mT @ short) * torch.where(values > 0, 1 / values, 0)[:, None]
    return (far.mT, values, near.mT) if tall else (near, values, far)


class _Krylov:
    """The space that powers of a symmetric ``(n, n)`` matrix make of random vectors: a basis, and its images."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        shape = (len(matrix), _BLOCK * _LARGEST)
        self.size, self.basis, self.images = 0, matrix.new_empty(shape), matrix.new_empty(shape)
        draw = torch.randn(len(matrix), _BLOCK, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
        self.next = matrix @ draw.to(matrix.device)

    def grow(self) -> None:
        """Take some powers more."""
        for _ in range(_BETWEEN):
            known, new = self.basis[:, : self.size], slice(self.size, self.size + _BLOCK)
            block = self.next
            for _ in range(2):  # once is not enough where little of a block is new
                block = torch.linalg.qr(block - known @ (known.mT @ block))[0]
            self.basis[:, new] = block
            self.next = self.images[:, new] = self.matrix @ block
            self.size += _BLOCK

    def leading(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The leading Ritz vectors ``(n, count)``, their values, and what they miss: ``matrix @ V − V Θ``."""
        basis, images = self.basis[:, : self.size], self.images[:, : self.size]
        squares, directions = (part.flip(-1)[..., :count] for part in torch.linalg.eigh(basis.mT @ images))
        near = basis @ directions
        return near, squares, images @ directions - near * squares


def _decompose(flat: Tensor, expected: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """All singular values, and the vectors of as many as are expected, from the Gram matrix of the shorter side."""
    tall = flat.shape[0] > flat.shape[1]
    short = flat.mT if tall else flat
    squares, directions = torch.linalg.eigh(short @ short.mT)
    values = squares.flip(-1).clamp_min(0).sqrt()
    near = directions.flip(-1)[:, :expected]
    far = (near.mT @ short) * torch.where(values > 0, 1 / values, 0)[:expected, None]
    return (far.mT, values, near.mT) if tall else (near, values, far)
