"""The nearest change of a smaller rank to one stored in full: exactly, or by a random projection with a proven bound.

A random projection (Halko, Martinsson, Tropp, arXiv 0909.4061) finds an orthonormal ``Q`` near the change's column
space. What it misses is known afterwards, exactly: ``ρ² = ‖Δ‖² − ‖QᵀΔ‖²``. By Ky Fan's inequality the best change of
any rank keeps at most ``ρ²`` more energy (squared norm) than the one found inside ``Q``. Where ``ρ²`` is below
:data:`MISSED` of the whole the projection is taken; where it is not, all singular values are computed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from texforce_hub.adapter.low_rank import LowRank

MISSED = 1e-8
"""The share of a change's energy by which a projected result may fall short of the best one of its rank."""
_SPARE = 10  # directions beyond the rank asked for: what a projection needs to be sure of the last ones
_NOISE = 8 * torch.finfo(torch.float32).eps  # of the largest singular value: rounding of float32 weights


def truncate_dense(
    change: Tensor, choose: Callable[[Tensor], int], *, expected: int | None = None
) -> tuple[LowRank, float]:
    """The change at the rank that ``choose`` gives for its singular values, and the share of its energy kept.

    Args:
        change: ``(out, in, *kernel)``, any floating dtype; worked on in float64.
        choose: a rank for the singular values, largest first; of a projection they are the leading ones.
        expected: the largest rank that may be chosen: a projection of a little more is tried first.

    Returns:
        halves in float32 that carry ``√S`` each, and a share in [0, 1].
    """
    flat = change.double().flatten(1)
    projected = None if expected is None else _project(flat, expected + _SPARE)
    left, values, right = projected or _decompose(flat)
    limit = max(1, int((values > _NOISE * values[:1]).sum()))
    rank = min(choose(values.cpu()), limit)
    root = values[:rank].sqrt()
    total = float(flat.square().sum())
    share = float(values[:rank].square().sum()) / total if total > 0 else 1.0
    down = (root[:, None] * right[:rank]).float().reshape(rank, *change.shape[1:])
    return LowRank(down, (left[:, :rank] * root).float()), min(1.0, share)


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


def _decompose(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triplets, from the Gram matrix of the shorter side."""
    tall = flat.shape[0] > flat.shape[1]
    short = flat.mT if tall else flat
    squares, directions = torch.linalg.eigh(short @ short.mT)
    values = squares.flip(-1).clamp_min(0).sqrt()
    near = directions.flip(-1)
    far = (near.mT @ short) * torch.where(values > 0, 1 / values, 0)[:, None]
    return (far.mT, values, near.mT) if tall else (near, values, far)
