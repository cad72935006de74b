"""Methods on singular vectors and values, computed from the factors."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from texforce_hub.adapter.algebra import check_one_shape, concat, norm, recompress
from texforce_hub.adapter.dense import Vector
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.merge.methods.linear import combine
from texforce_hub.merge.methods.registry import Mergeable, merge_method
from texforce_hub.merge.methods.spaces import leading_directions, matrices
from texforce_hub.merge.methods.sparse import Election, Majority, Normalize, elect, trim_entries


def singular_triplets(layer: LowRank, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``U (out, k)``, ``S (k,)``, ``Vᵀ (k, in)`` of a change, largest first, from its factors."""
    (balanced, _), *_ = recompress([layer], rank=rank)
    root = balanced.up.norm(dim=0).clamp_min(torch.finfo(balanced.up.dtype).tiny)
    return balanced.up / root, root.square(), balanced.down.flatten(1) / root[:, None]


def nearest_orthonormal(stacked: Tensor) -> Tensor:
    """The orthonormal matrix nearest to ``stacked`` (Procrustes): its polar factor."""
    left, _, right = torch.linalg.svd(stacked, full_matrices=False)
    return torch.matmul(left, right)


def _has_vectors(layers: Sequence[Mergeable]) -> bool:
    return any(isinstance(layer, Vector) for layer in layers)


@merge_method(laws={"identity", "gauge", "scale", "order"})
def tsv(layers: Sequence[Mergeable], weights: Sequence[float], *, share: float | None = None) -> Mergeable:
    """The sources' leading singular vectors, made orthogonal to each other before they are summed (TSV-M).

    arXiv 2412.00081. Of each of n sources the leading share of its rank is kept; all left vectors together, and
    all right ones, are replaced by the nearest orthonormal set. Vectors (biases) are summed.

    Args:
        share: share of each source's rank that is kept; by default 1/n (the paper).
    """
    if _has_vectors(layers):
        return combine(layers, weights)
    factors = matrices(layers)
    check_one_shape(factors)
    kept = [max(1, math.floor(layer.rank * (share or 1 / len(factors)) + 1e-9)) for layer in factors]
    triplets = [singular_triplets(layer, rank) for layer, rank in zip(factors, kept)]
    left = nearest_orthonormal(torch.cat([u for u, _, _ in triplets], dim=1))
    right = nearest_orthonormal(torch.cat([v for _, _, v in triplets]))
    values = torch.cat([s * w for (_, s, _), w in zip(triplets, weights)])
    root = values.abs().sqrt()
    return LowRank((root[:, None] * right).reshape(-1, *factors[0].down.shape[1:]), left * (root * values.sign()))


@merge_method(laws={"gauge", "scale", "order", "negation"})
def iso_c(layers: Sequence[Mergeable], weights: Sequence[float], *, over: Literal["rank", "all"] = "rank") -> Mergeable:
    """The exact sum with all its singular values replaced by their mean (Iso-C, arXiv 2502.04959).

    One source does not come back as it was: its directions do, at equal strength. Vectors are summed.

    Args:
        over: what the mean is taken over. rank: the singular values that are not zero; all: as many as the
            smaller side is long (the paper's code, written for full rank; shrinks a low-rank sum).
    """
    if _has_vectors(layers):
        return combine(layers, weights)
    factors = matrices(layers)
    left, values, right = singular_triplets(concat(factors, weights))
    size = sum(abs(w) * norm(layer) for layer, w in zip(factors, weights))
    rank = int((values > max(8 * torch.finfo(values.dtype).eps, 1e-8) * size).sum())
    count = rank if over == "rank" else min(left.shape[0], right.shape[1])
    root = (values[:rank].sum() / max(1, count)).sqrt()
    rank = max(1, rank)
    return LowRank((root * right[:rank]).reshape(-1, *factors[0].down.shape[1:]), root * left[:, :rank])


@merge_method(laws={"gauge", "scale", "order"})
def knots(
    layers: Sequence[Mergeable],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    majority: Majority = "mass",
    election: Election = "weighted",
    normalize: Normalize = "count",
) -> Mergeable:
    """TIES in the basis that all sources share (KnOTS, arXiv 2410.19735); rank at most the sum of the ranks.

    [Δ₁ … Δₙ] = U [S V₁ᵀ … S Vₙᵀ]: TIES merges the blocks S Vᵢᵀ, and U carries the result back. Vectors are
    merged as they are.

    Args:
        density: share of entries kept of each block.
        majority: as in ties.
        election: as in ties.
        normalize: as in ties.
    """
    if _has_vectors(layers):
        blocks = torch.stack([layer.delta()[None] for layer in layers])
        return Vector(_ties(blocks, weights, density, majority, election, normalize)[0])
    factors = matrices(layers)
    basis, blocks = shared_blocks(factors)
    merged = _ties(blocks, weights, density, majority, election, normalize)
    return LowRank(merged.reshape(-1, *factors[0].down.shape[1:]), basis)


def shared_blocks(factors: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """``U (out, k)`` and the blocks ``S Vᵢᵀ`` ``(n, k, in)`` of the changes side by side, from their factors."""
    stacked = concat(factors, [1.0] * len(factors))
    q, r = torch.linalg.qr(stacked.up)
    ranks = [layer.rank for layer in factors]
    downs = torch.split(stacked.down.flatten(1), ranks)
    blocks = torch.stack([part @ down for part, down in zip(torch.split(r, ranks, dim=1), downs)])
    tall = blocks.double()
    directions = leading_directions((tall @ tall.mT).sum(0), q.dtype)
    return q @ directions, directions.mT @ blocks


def _ties(
    blocks: Tensor,
    weights: Sequence[float],
    density: float,
    majority: Majority,
    election: Election,
    normalize: Normalize,
) -> Tensor:
    trimmed = trim_entries(blocks, density)
    factors = torch.tensor(weights, dtype=blocks.dtype, device=blocks.device)
    return elect(trimmed, factors, majority, election, normalize)
