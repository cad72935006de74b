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

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.moving import move_all, read_numbers
from texforce_hub.adapter.tensors import square_of

Triplet = tuple[Tensor, Tensor, Tensor]
"""Left singular vectors as columns, values, right ones as rows."""

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
    return truncate_dense_ones([change], [choose], expected=[expected])[0]


def truncate_dense_ones(
    changes: Sequence[Tensor], choices: Sequence[Callable[[Tensor], int]], *, expected: Sequence[int | None]
) -> list[tuple[LowRank, float]]:
    """As :func:`truncate_dense`, of several; a device is waited for twice where projections tell."""
    flats = [change.double().flatten(1) for change in changes]
    near = [_project(flat, most) for flat, most in zip(flats, expected)]
    unread = [flat.square().sum() for flat in flats] + [each[1] for each in near if each is not None]
    totals = read_numbers(unread)
    missed = iter(totals[len(flats) :])
    triplets = [
        _inside(*each[0])
        if each is not None and next(missed) <= MISSED * total
        else _search(flat, most) or _decompose(flat, most)
        for flat, each, most, total in zip(flats, near, expected, totals)
    ]
    values = move_all([triplet[1] for triplet in triplets], torch.device("cpu"))
    return [_cut(*each) for each in zip(changes, triplets, values, totals, choices)]


def _cut(
    change: Tensor, triplet: Triplet, known: Tensor, total: float, choose: Callable[[Tensor], int]
) -> tuple[LowRank, float]:
    """The leading triplets as halves; ``known`` are their values in main memory."""
    left, values, right = triplet
    limit = max(1, int((known > _NOISE * known[:1]).sum()))
    rank = min(choose(_with_rest(known, total, min(change.shape[0], change[0].numel()))), limit)
    root = values[:rank].sqrt()
    share = float(known[:rank].square().sum()) / total if total > 0 else 1.0
    down = (root[:, None] * right[:rank]).float().reshape(rank, *change.shape[1:])
    return LowRank(down, (left[:, :rank] * root).float()), min(1.0, share)


def _with_rest(values: Tensor, total: float, count: int) -> Tensor:
    """The singular values, and where they are not all ``count`` of them the rest of the energy as one more."""
    if len(values) == count:
        return values
    rest = max(0.0, total - float(values.square().sum()))
    return torch.cat([values, values.new_tensor([rest]).sqrt()])


def _project(flat: Tensor, expected: int | None) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
    """A random projection, as a basis and what it makes of the change, and the energy that it misses."""
    size = 0 if expected is None else expected + _SPARE
    if not 0 < size < min(flat.shape) // 2:
        return None
    draw = torch.randn(flat.shape[1], size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(flat @ draw.to(flat.device))[0]
    basis = torch.linalg.qr(flat @ (flat.mT @ basis))[0]  # once more: what is small beside the rest gets smaller
    inside = basis.mT @ flat
    return (basis, inside), flat.square().sum() - inside.square().sum()


def _inside(basis: Tensor, inside: Tensor) -> Triplet:
    """The leading singular triplets inside a projection."""
    left, values, right = torch.linalg.svd(inside, full_matrices=False)
    return basis @ left, values, right


def _search(flat: Tensor, rank: int | None) -> Triplet | None:
    """The leading singular triplets inside a Krylov space, or ``None`` if it may miss too much."""
    if rank is None:
        return None
    tall = flat.shape[0] > flat.shape[1]
    short = flat.mT if tall else flat
    count = rank + _SPARE
    if len(short) < 3 * _BLOCK * _LARGEST or 4 * count > _BLOCK * _LARGEST:  # all of them are as soon computed
        return None
    gram = square_of(short)
    space = _Krylov(gram)
    for _ in range(_LARGEST // _BETWEEN):
        space.grow()
        near, squares, error = space.leading(count)
        gap = (squares[rank - 1] - squares[-1]) / 2
        if bool(error.square().sum() <= MISSED * gram.trace() * gap):
            break
    else:
        return None
    scaled = squares[:, None] * near + error
    rest = gram - torch.cat([near, error]).mT @ torch.cat([scaled, near])
    edge = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (squares[rank - 1] - gap)
    if bool(torch.linalg.cholesky_ex(edge - rest).info):
        return None
    values = squares.clamp_min(0).sqrt()
    far = (near @ short) * torch.where(values > 0, 1 / values, 0)[:, None]
    return (far.mT, values, near) if tall else (near.mT, values, far)


class _Krylov:
    """The space that powers of a symmetric ``(n, n)`` matrix make of random vectors: a basis, and its images.

    Vectors are rows: a few of them times the matrix are twice as fast as the matrix times them.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        shape = (_BLOCK * _LARGEST, len(matrix))
        self.size, self.basis, self.images = 0, matrix.new_empty(shape), matrix.new_empty(shape)
        draw = torch.randn(len(matrix), _BLOCK, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
        self.next = draw.to(matrix.device).mT @ matrix

    def grow(self) -> None:
        """Take some powers more."""
        for _ in range(_BETWEEN):
            known, new = self.basis[: self.size], slice(self.size, self.size + _BLOCK)
            block = self.next
            for _ in range(2):  # once is not enough where little of a block is new
                block = torch.linalg.qr((block - (block @ known.mT) @ known).mT)[0].mT
            self.basis[new] = block
            self.next = self.images[new] = self.basis[new] @ self.matrix
            self.size += _BLOCK

    def leading(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The leading Ritz vectors ``(count, n)``, their values, and what they miss: ``V matrix − Θ V``."""
        basis, images = self.basis[: self.size], self.images[: self.size]
        squares, directions = (part.flip(-1)[..., :count] for part in torch.linalg.eigh(basis @ images.mT))
        near = directions.mT @ basis
        return near, squares, directions.mT @ images - squares[:, None] * near


def _decompose(flat: Tensor, expected: int | None) -> Triplet:
    """All singular values, and the vectors of as many as are expected, from the Gram matrix of the shorter side."""
    tall = flat.shape[0] > flat.shape[1]
    short = flat.mT if tall else flat
    squares, directions = torch.linalg.eigh(square_of(short))
    values = squares.flip(-1).clamp_min(0).sqrt()
    near = directions.flip(-1)[:, :expected]
    far = (near.mT @ short) * torch.where(values > 0, 1 / values, 0)[:expected, None]
    return (far.mT, values, near.mT) if tall else (near, values, far)
