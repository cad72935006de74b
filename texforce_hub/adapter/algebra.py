"""Algebra on low-rank changes, exact and without ever forming a dense change.

A sum of low-rank changes is one low-rank change: stack the ups side by side, the downs on top of each other
(:func:`concat`). Its best approximation of a smaller rank (Eckart–Young) is found from the factors alone
(:func:`recompress`), and so are inner products (:func:`gram`). Everything runs where the tensors are;
layers of equal shape go through one batched call. Sums over ranks are taken in float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from texforce_hub.adapter.batches import in_rounds, lies_on_device
from texforce_hub.adapter.factors import Factors, factor
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.sums import Sums, alike, sum_dtype
from texforce_hub.errors import MergeError

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
    dtype = sum_dtype(layers)
    ups = [layer.up.to(dtype) for layer in layers]
    downs = [layer.down.to(dtype) * (layer.scale * weight) for layer, weight in zip(layers, weights)]
    return LowRank(torch.cat(downs), torch.cat(ups, dim=1))


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
    for indices, factors in _factored(layers):
        for index, row in zip(indices, factors.values):
            values[index] = row[: min(layers[index].shape[0], row.numel(), math.prod(layers[index].shape[1:]))]
    return values


def recompress(
    layers: Sequence[LowRank], *, rank: int | Sequence[int] | None = None, energy: float | None = None
) -> list[tuple[LowRank, float]]:
    """The nearest changes of smaller rank, and the share of each change's energy (squared norm) they keep.

    With ``up = Q R``, the left singular vectors of the change are ``Q U`` with ``R (down downᵀ) Rᵀ = U S² Uᵀ``, a
    rank × rank problem (see :mod:`texforce_hub.adapter.sums`). Both halves carry ``√S``, so that small changes
    survive storage in half precision. Costs O((out + in) · rank²) and O((out + in) · rank) memory.

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
    for indices, factors in _factored(layers):
        kernels = [layers[index].down.shape[1:] for index in indices]
        results |= zip(indices, cut(factors, kernels, [partial(choose, index) for index in indices]))
    return [results[i] for i in range(len(layers))]


def _factored(layers: Sequence[LowRank]) -> Iterator[tuple[list[int], Factors]]:
    chunks = alike([[layer] for layer in layers])
    for some in in_rounds(chunks, on_device=lies_on_device(layers)):
        batches = [Sums([[layers[index]] for index in chunk]) for chunk in some]
        yield from zip(some, factor([sums.weigh(torch.ones_like(sums.scales)) for sums in batches]))


def cut(
    factors: Factors, kernels: Sequence[Sequence[int]], choices: Sequence[Callable[[Tensor], int]]
) -> list[tuple[LowRank, float]]:
    """A batch's changes at chosen ranks, and the shares of their energy kept.

    ``kernels`` are the shapes ``(in, *kernel)`` of what their downs read, ``choices`` give a rank for singular values.
    """
    values = factors.values
    limits = (values > factors.noise * values[:, :1]).sum(1).clamp_min(1).tolist()
    ranks = [max(1, min(choose(row), limit)) for choose, row, limit in zip(choices, values, limits)]
    energy = values.square().cumsum(1)
    kept = energy.gather(1, torch.tensor(ranks)[:, None] - 1)[:, 0]
    shares = torch.where(energy[:, -1] > 0, kept / energy[:, -1], 1.0).clamp_max(1.0).tolist()
    ups, downs = factors.project(max(ranks))
    results: list[tuple[LowRank, float]] = []
    for up, down, rank, kernel, share in zip(ups, downs, ranks, kernels, shares):
        columns = up[:, :rank].clone(memory_format=torch.contiguous_format)
        results.append((LowRank(down[:rank].reshape(rank, *kernel).clone(), columns), share))
    return results
