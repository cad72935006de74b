"""Where a formula on stacked changes works: on the dense changes, or on their cores.

Core space (arXiv 2509.17786): with orthonormal ``U`` spanning all ups and ``V`` spanning all downs, change
``i`` is exactly ``U Mᵢ Vᵀ`` with a core ``Mᵢ = (Uᵀ upᵢ)(downᵢ V)`` of size (sum of ranks)². A formula on the
cores costs a thousandth, and its result has rank at most the sum of the ranks.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from texforce_hub.adapter.algebra import recompress
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import eigh
from texforce_hub.merge.methods.registry import Context, Mergeable, MergeFunction, Option

Space = Literal["dense", "core"]
Reference = Literal["balanced", "stored"]

#: The options of every method on stacked changes.
#: space: dense: on the dense changes, layer by layer, as published; core: on the exact cores, far faster, of rank at
#:     most the sum of the ranks. Not the same result: entries depend on the basis.
#: reference: of the core basis. balanced: every source by its own singular vectors first, so the result does not
#:     depend on how its halves are stored; stored: of the halves as they are (the paper's code).
SPACES = MappingProxyType({"space": Option.of(Space, "dense"), "reference": Option.of(Reference, "balanced")})


@dataclass(frozen=True, slots=True)
class View:
    """One layer's changes stacked for a formula, and the way back from its result.

    Shapes:
        deltas: ``(n, rows, columns)``
    """

    deltas: Tensor
    rebuild: Callable[[Tensor], Mergeable]


def as_low_rank(layer: LowRank | Dense) -> LowRank:
    """The same change in factors; a dense one is itself times the identity of its smaller side, exactly."""
    if isinstance(layer, LowRank):
        return layer
    flat = layer.delta().flatten(1)
    out, width = flat.shape
    identity = torch.eye(min(out, width), dtype=flat.dtype, device=flat.device)
    if out <= width:
        return LowRank(flat.view(layer.shape), identity)
    return LowRank(identity.view(width, *layer.shape[1:]), flat)


def matrices(layers: Sequence[Mergeable]) -> list[LowRank]:
    """The layers as factors; vectors must have been dealt with before."""
    return [as_low_rank(layer) for layer in layers if not isinstance(layer, Vector)]


def orthonormal(halves: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors of tall ``(n, k)`` halves, and the halves in them: ``U``, ``Uᵀ halves``.

    Directions that are rounding noise are left out, so that padding a rank with zeros changes nothing.
    """
    q, r = torch.linalg.qr(halves)
    directions = leading_directions((r.double() @ r.double().mT), r.dtype)
    return q @ directions, directions.mT @ r


def leading_directions(squares: Tensor, dtype: torch.dtype) -> Tensor:
    """Eigenvectors ``(k, m)`` of a matrix of squares, largest first, without those of rounding noise."""
    values, directions = eigh(squares)
    floor = max(8 * torch.finfo(dtype).eps, 1e-8) ** 2 * values[-1].clamp_min(0)
    count = max(1, int((values > floor).sum()))
    leading: Tensor = directions.flip(-1)[:, :count].to(dtype)
    return leading


def dense_view(layers: Sequence[Mergeable]) -> View:
    """The dense changes ``(n, out, in · kernel)``; a vector is one row."""
    shape = layers[0].shape
    rows = 1 if isinstance(layers[0], Vector) else shape[0]
    deltas = torch.stack([layer.delta().reshape(rows, -1) for layer in layers])
    kind = Vector if isinstance(layers[0], Vector) else Dense
    return View(deltas, lambda merged: kind(merged.reshape(shape)))


def core_view(layers: Sequence[Mergeable], *, reference: Reference = "balanced") -> View:
    """The cores ``(n, k, k')``; vectors have none and stay as they are."""
    if any(isinstance(layer, Vector) for layer in layers):
        return dense_view(layers)
    factors = matrices(layers)
    if reference == "balanced":
        factors = [layer for layer, _ in recompress(factors)]
    dtype = functools.reduce(torch.promote_types, (layer.up.dtype for layer in factors), torch.float32)
    left, ups = orthonormal(torch.cat([layer.up.to(dtype) for layer in factors], dim=1))
    right, downs = orthonormal(torch.cat([layer.down.to(dtype).flatten(1) for layer in factors]).mT)
    ranks = [layer.rank for layer in factors]
    pairs = zip(factors, torch.split(ups, ranks, dim=1), torch.split(downs, ranks, dim=1))
    cores = torch.stack([layer.scale * up @ down.mT for layer, up, down in pairs])
    kernel = layers[0].shape[1:]
    return View(cores, lambda merged: LowRank((merged @ right.mT).reshape(-1, *kernel), left))


def view(layers: Sequence[Mergeable], *, space: Space, reference: Reference) -> View:
    """The changes stacked in one space or the other."""
    return dense_view(layers) if space == "dense" else core_view(layers, reference=reference)


def on_deltas(formula: Callable[..., Tensor]) -> MergeFunction:
    """Lift ``f(deltas (n, rows, columns), weights (n,), *, context, **options) -> (rows, columns)`` to layers.

    The lifted method has the formula's options and :data:`SPACES`; only the layer in hand is ever dense.
    """

    @functools.wraps(formula)
    def lifted(
        layers: Sequence[Mergeable],
        weights: Sequence[float],
        *,
        space: Space = "dense",
        reference: Reference = "balanced",
        context: Context | None = None,
        **options: Any,
    ) -> Mergeable:
        seen = view(layers, space=space, reference=reference)
        factors = torch.tensor(weights, dtype=seen.deltas.dtype, device=seen.deltas.device)
        return seen.rebuild(formula(seen.deltas, factors, context=context or Context(), **options))

    return lifted


def count_kept(density: float, entries: int) -> int:
    """How many of ``entries`` a density keeps: rounded down, at least one."""
    return max(1, math.floor(density * entries))
