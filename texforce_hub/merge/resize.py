"""Give an adapter smaller ranks, each layer at its best (Eckart–Young), and say what share is kept."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from texforce_hub.adapter.algebra import count_for, singular_values, truncate
from texforce_hub.adapter.batches import enough_for, in_rounds, lies_on_device, take_batches
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.dense_rank import truncate_dense_ones
from texforce_hub.adapter.lazy import LazyAdapter, check_is_adapter
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.moving import read_numbers
from texforce_hub.adapter.value import Adapter, Layer, LayerName
from texforce_hub.apply.model import Base, find_weight
from texforce_hub.device import Dtype, given_dtype
from texforce_hub.errors import MergeError
from texforce_hub.families.order import natural
from texforce_hub.merge.methods.resolve import resolve
from texforce_hub.merge.methods.spaces import as_low_rank
from texforce_hub.merge.overflow import check_results, naming_overflow

MOST_RANKS = 10**9
"""No adapter's ranks, nor their sum, come near it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the ranks; every bound that is given holds.

    rank: of each layer, at least 1
    energy: the smallest rank that keeps this share of the layer's squared norm, in (0, 1]
    ratio: singular values smaller than the largest divided by this are dropped, above 1
    max_total_rank: the sum of the ranks, spent where the singular values are largest over all layers

    Raises:
        MergeError: a bound outside its range.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    max_total_rank: int | None = None

    def __post_init__(self) -> None:
        for label, bound in (("rank", self.rank), ("max_total_rank", self.max_total_rank)):
            if bound is not None and not 1 <= bound <= MOST_RANKS:
                raise MergeError(f"{label} {bound!s:.40}; expected at least 1 and at most {MOST_RANKS}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise MergeError(f"energy {self.energy!s:.40}; expected a share in (0, 1], e.g. 0.99")
        if self.ratio is not None and not 1 < self.ratio <= sys.float_info.max:
            raise MergeError(f"ratio {self.ratio!s:.40}; expected more than 1, and finite, e.g. 100")

    @property
    def any(self) -> bool:
        """Whether anything is bounded at all."""
        return any(b is not None for b in (self.rank, self.energy, self.ratio, self.max_total_rank))

    def count(self, values: Tensor) -> int:
        """How many of one layer's singular values the bounds of a single layer keep."""
        keep = count_for(values, rank=self.rank, energy=self.energy)
        if self.ratio is not None:
            keep = min(keep, max(1, int((values >= values[0] / self.ratio).sum())))
        return keep


@dataclass(frozen=True, slots=True)
class ResizedLayer:
    """What became of one layer: rank before and after, share of its squared norm kept, norm before."""

    name: LayerName
    before: int | None
    after: int | None
    kept: float
    norm: float


@dataclass(frozen=True, slots=True, repr=False)
class Resized:
    """A resized adapter and what it kept, layer by layer."""

    adapter: Adapter
    layers: tuple[ResizedLayer, ...]

    def __repr__(self) -> str:
        return f"Resized({self.adapter!r}, {self.kept:.1%} kept)"

    @property
    def kept(self) -> float:
        """The share of the whole adapter's squared norm that is kept."""
        total = math.fsum(layer.norm**2 for layer in self.layers)
        return math.fsum(layer.kept * layer.norm**2 for layer in self.layers) / total if total > 0 else 1.0


def shrink(
    layers: Mapping[LayerName, LowRank], limits: Limits, *, ranks: Mapping[LayerName, int] | None = None
) -> dict[LayerName, tuple[LowRank, float]]:
    """The layers under the limits, and the shares kept; ``ranks`` bounds single layers besides."""
    names, stacked = list(layers), list(layers.values())
    budget = None
    if limits.max_total_rank is not None:
        budget = spend_budget(singular_values(stacked), limits)

    def choose(index: int, values: Tensor) -> int:
        bounds = [limits.count(values)]
        if ranks is not None and names[index] in ranks:
            bounds.append(ranks[names[index]])
        if budget is not None:
            bounds.append(budget[index])
        return max(1, min(bounds))

    return dict(zip(names, truncate(stacked, choose)))


def shrink_dense(
    layers: Mapping[LayerName, Dense], limits: Limits, *, ranks: Mapping[LayerName, int] | None = None
) -> dict[LayerName, tuple[LowRank, float]]:
    """As :func:`shrink`, of changes that are stored in full; ``limits`` are those of single layers.

    A device is waited for a few times for all; main memory has one of them in float64 at a time.
    """
    # A projection shows the leading values only: enough for a rank, not for a share near 1 or a ratio.
    narrow = limits.ratio is None and (limits.energy is None or limits.energy <= 0.999)

    def choose(bounds: Sequence[int], values: Tensor) -> int:
        return max(1, min([limits.count(values), *bounds]))

    results: dict[LayerName, tuple[LowRank, float]] = {}
    for names in in_rounds(layers, on_device=lies_on_device(layers.values())):
        bounds = [[b for b in (limits.rank, (ranks or {}).get(name)) if b is not None] for name in names]
        expected = [min(bound) if bound and narrow else None for bound in bounds]
        choices = [partial(choose, bound) for bound in bounds]
        deltas = [layers[name].delta() for name in names]
        results |= zip(names, truncate_dense_ones(deltas, choices, expected=expected))
    return results


def spend_budget(spectra: list[Tensor], limits: Limits) -> list[int]:
    """Ranks whose sum is at most ``max_total_rank`` and which keep the most energy; every layer gets 1.

    Raises:
        MergeError: fewer ranks than layers.
    """
    total = limits.max_total_rank or 0
    if total < len(spectra):
        raise MergeError(f"max_total_rank {total} for {len(spectra)} layers; expected at least 1 a layer")
    if not spectra:
        return []
    allowed = [limits.count(values) for values in spectra]
    beyond = [values[1:count].cpu() for values, count in zip(spectra, allowed)]
    owners = torch.cat([torch.full((len(v),), i) for i, v in enumerate(beyond)])
    best = torch.cat(beyond).argsort(descending=True, stable=True)[: total - len(spectra)]
    return (torch.bincount(owners[best].long(), minlength=len(spectra)) + 1).tolist()


def resize_adapter(
    adapter: Adapter | LazyAdapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    max_total_rank: int | None = None,
    base: Base | None = None,
    device: str | torch.device | None = None,
    dtype: Dtype | None = None,
) -> Resized:
    """The adapter with smaller ranks; LoHa, LoKr, DoRA and dense layers become low rank, vectors stay as they are.

    A few layers are in hand at a time, so that of a stored adapter only the result is ever whole in memory.

    Args:
        rank: the largest rank of a layer.
        energy: the smallest rank that keeps this share of a layer's squared norm, in (0, 1].
        ratio: keep singular values within this factor of the largest.
        max_total_rank: the sum of all ranks, spent where it keeps the most.
        base: pipeline, model or mapping of weights; only DoRA layers need it, whose change depends on it.
        device: where to compute; the adapter's own by default.
        dtype: of the result; float32 by default.

    Raises:
        MergeError: no limit, one outside its range, or a DoRA layer and no base that has its weight.
        ConfigError: something else than an adapter, or no dtype of this name.

    Example:
        >>> from texforce_hub import read_adapter, resize_adapter
        >>> max(resize_adapter(read_adapter("shapes-colour"), rank=2).adapter.ranks.values())
        2
    """
    check_is_adapter(adapter)
    limits, kind = Limits(rank, energy, ratio, max_total_rank), given_dtype(dtype)
    if not limits.any:
        raise MergeError("nothing to resize to: give rank, energy, ratio or max_total_rank")

    def move(layer: Layer) -> Layer:
        return layer.map(lambda tensor: tensor.to(device))

    def resolved() -> Iterator[tuple[LayerName, LowRank | Dense]]:
        for name, layer in adapter.layers.items():
            weight = find_weight(base, name, layer.shape) if isinstance(layer, Decomposed) else None
            plain = resolve(name, move(layer), weight)
            if not isinstance(plain, Vector):
                yield name, plain

    enough = enough_for(adapter, device)
    each, ranks = _spread_budget(resolved, limits, enough)
    kept: dict[LayerName, tuple[LowRank, float]] = {}
    for together in take_batches(resolved(), enough=enough):
        with naming_overflow(next(iter(together))):
            kept |= shrink(_low_ones(together), each, ranks=ranks)
            dense = {name: layer for name, layer in together.items() if isinstance(layer, Dense)}
            kept |= shrink_dense(dense, each, ranks=ranks)
    layers = {name: kept[name][0] if name in kept else move(adapter.layers[name]) for name in adapter.layers}
    check_results(layers)
    before = adapter.outline if isinstance(adapter, LazyAdapter) else adapter
    names = sorted(layers, key=natural)
    norms = _norms(layers, kept)
    facts = tuple(_fact(before.layers[name], name, layers[name], kept.get(name), norms[name]) for name in names)
    return Resized(Adapter(layers, before.metadata, dict(adapter.extras)).to(dtype=kind), facts)


def _low_ones(layers: Mapping[LayerName, LowRank | Dense]) -> dict[LayerName, LowRank]:
    return {name: layer for name, layer in layers.items() if isinstance(layer, LowRank)}


def _spread_budget(
    resolved: Callable[[], Iterator[tuple[LayerName, LowRank | Dense]]], limits: Limits, enough: int
) -> tuple[Limits, dict[LayerName, int] | None]:
    """The limits of each layer by itself, and the ranks that a limit of their sum allows."""
    if limits.max_total_rank is None:
        return limits, None
    spectra: dict[LayerName, Tensor] = {}
    for together in take_batches(resolved(), enough=enough):
        with naming_overflow(next(iter(together))):
            spectra |= zip(together, singular_values([as_low_rank(layer) for layer in together.values()]))
    ranks = spend_budget(list(spectra.values()), limits)
    return replace(limits, max_total_rank=None), dict(zip(spectra, ranks))


def _norms(
    layers: Mapping[LayerName, Layer], kept: Mapping[LayerName, tuple[LowRank, float]]
) -> dict[LayerName, float]:
    """The layers' norms before they were resized."""
    others = [name for name in layers if name not in kept]
    lengths = read_numbers([layers[name].delta().norm() for name in others])
    return {**norms_before(kept), **dict(zip(others, lengths))}


def _fact(
    before: Layer, name: LayerName, layer: Layer, kept: tuple[LowRank, float] | None, length: float
) -> ResizedLayer:
    if kept is None:
        return ResizedLayer(name, None, None, 1.0, length)
    return ResizedLayer(name, before.rank, layer.rank, kept[1], length)


def norms_before(shrunk: Mapping[LayerName, tuple[LowRank, float]]) -> dict[LayerName, float]:
    """The norms of changes before truncation, from what truncation left and the shares that are."""
    # Balanced halves: the squared lengths of the columns of up are the singular values.
    left = read_numbers([layer.up.double().square().sum(0).square().sum() for layer, _ in shrunk.values()])
    shares = [share for _, share in shrunk.values()]
    lengths = [math.sqrt(square / share) if share > 0 else 0.0 for square, share in zip(left, shares)]
    return dict(zip(shrunk, lengths))
