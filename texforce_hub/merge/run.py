"""One run of a merge: a few layers at a time, those of one shape as one batch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from texforce_hub.adapter.algebra import concat, cut, norm
from texforce_hub.adapter.batches import count_numbers, take_together
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.sums import Sums, alike
from texforce_hub.adapter.value import Adapter, LayerName
from texforce_hub.merge.gather import Gathered, Group
from texforce_hub.merge.measures import Tally
from texforce_hub.merge.methods.linear import products
from texforce_hub.merge.methods.registry import Mergeable, Terms
from texforce_hub.merge.overflow import check_results, naming_overflow
from texforce_hub.merge.report import MergeReport
from texforce_hub.merge.request import MergeRequest
from texforce_hub.merge.resize import Limits, norm_before, shrink, shrink_dense


class MergeRun:
    """One run: every layer merged, what is low rank truncated at once, norms and cosines noted.

    A linear method is told by its coefficients: the Gram matrices that give the sources' inner products give the
    truncated sum as well. Any other is asked layer by layer.
    """

    def __init__(self, gathered: Gathered, request: MergeRequest) -> None:
        self.gathered = gathered
        self.method, self.options, self.limits = request.definition, request.options, request.limits
        self.tally = Tally(gathered)
        self.floors: Mapping[int, float] | None = None
        #: Without any limit, ``svd`` gives a layer the largest rank among its sources.
        self.ranks: dict[LayerName, int] = {}
        #: The layers that have got their final rank.
        self.cut: set[LayerName] = set()
        #: The sum of all ranks is spent over all layers at once; other limits let a few layers go together.
        self.spends = self.limits.max_total_rank is not None

    def run(self) -> tuple[Adapter, MergeReport]:
        """The merged layers as an adapter without metadata, and the report."""
        self.floors = self._survey()
        done: dict[LayerName, Mergeable] = {}
        enough = {"enough": math.inf} if self.spends else {}
        for groups in take_together(self.gathered.groups(), _count, **enough):
            with naming_overflow(groups[0].name):
                merged = self._merge_together(groups)
            check_results(merged)
            done.update(merged)
        layers = {name: done[name] for name in self.gathered.names if name in done and name not in self.tally.removed}
        return Adapter(layers), self.tally.report(self.method.name, layers)

    def _survey(self) -> Mapping[int, float] | None:
        """What the method must know of all layers before the first is merged."""
        if self.method.survey is None:
            return None

        def stream() -> Iterator[tuple[tuple[int, ...], Sequence[Mergeable]]]:
            for group in self.gathered.groups():
                if group.layers:
                    yield group.context.positions, group.layers

        return self.method.survey(stream, self.options)

    def _merge_together(self, groups: Sequence[Group]) -> dict[LayerName, Mergeable]:
        merged: dict[LayerName, Mergeable] = {}
        factored = [group for group in groups if group.factors]
        for indices in alike([group.factors for group in factored]):
            merged.update(self._merge_alike([factored[index] for index in indices]))
        for group in groups:
            if not group.layers:
                self.tally.removed.add(group.name)
            elif not group.factors:
                inner = products(group.layers).cpu()
                self.tally.note_sources([group], inner[None])
                merged.update(self._merge_one(group, inner))
        late = {n: layer for n, layer in merged.items() if isinstance(layer, LowRank) and self._truncates_late(n)}
        return merged | self._truncate(late)

    def _merge_alike(self, groups: Sequence[Group]) -> dict[LayerName, Mergeable]:
        """Layers of one shape; the truncated ones' norms and shares are known then."""
        sums = Sums([group.factors for group in groups])
        inner = sums.products().cpu()
        self.tally.note_sources(groups, inner)
        if self.method.coefficients is None or self.spends:
            return {n: m for group, each in zip(groups, inner) for n, m in self._merge_one(group, each).items()}
        weights = torch.tensor([self._coefficients(*pair) for pair in zip(groups, inner)], dtype=torch.float64)
        lengths = (weights[:, None, :] @ inner @ weights[:, :, None]).flatten().clamp_min(0).sqrt().tolist()
        left = [not self._is_gone(group, length) for group, length in zip(groups, lengths)]
        if self.method.name != "svd" and not self.limits.any:
            return {g.name: concat(g.factors, w) for g, w, stays in zip(groups, weights.tolist(), left) if stays}
        merged: dict[LayerName, Mergeable] = {}
        for rows, factors in sums.factor(weights.to(sums.up.device)):
            kernels = [groups[row].factors[0].down.shape[1:] for row in rows]
            choices = [partial(self._rank, groups[row]) for row in rows]
            for row, (layer, share) in zip(rows, cut(factors, kernels, choices)):
                self.tally.kept[groups[row].name] = share
                self.cut.add(groups[row].name)
                merged[groups[row].name] = layer
        return {group.name: merged[group.name] for group, stays in zip(groups, left) if stays}

    def _coefficients(self, group: Group, inner: Tensor) -> Sequence[float]:
        assert self.method.coefficients is not None
        return self.method.coefficients(Terms(inner, group.weights, group.context.positions), **self.options)

    def _is_gone(self, group: Group, length: float) -> bool:
        return group.name in self.tally.removed or self.tally.has_cancelled(group.name, length)

    def _rank(self, group: Group, values: Tensor) -> int:
        return self.limits.count(values) if self.limits.any else max(layer.rank for layer in group.factors)

    def _merge_one(self, group: Group, inner: Tensor) -> dict[LayerName, Mergeable]:
        """One layer, or nothing if nothing is left of it."""
        if group.name in self.tally.removed:
            return {}
        merged = self._merge(group, inner)
        if self.method.name == "svd" and not self.limits.any and group.factors:
            self.ranks[group.name] = max(layer.rank for layer in group.factors)
        late = isinstance(merged, LowRank) and self._truncates_late(group.name)
        if not late and self.tally.has_cancelled(group.name, _norm(merged)):
            return {}
        return {group.name: self._limited(group.name, merged)}

    def _merge(self, group: Group, inner: Tensor) -> Mergeable:
        if self.method.coefficients is not None and group.factors:
            return concat(group.factors, self._coefficients(group, inner))
        return self.method.merge(group.layers, group.weights, self.options, group.context.with_floors(self.floors))

    def _truncates_late(self, name: LayerName) -> bool:
        """Whether a low-rank layer is still to be truncated; its singular values, then known, give its norm."""
        return name not in self.cut and (self.limits.any or name in self.ranks)

    def _limited(self, name: LayerName, merged: Mergeable) -> Mergeable:
        """A matrix under a limit becomes low rank at once, so that a dense one is never held."""
        if isinstance(merged, LowRank) or merged.shape[1:] == () or not self.limits.any:
            return merged
        cap = self.limits.max_total_rank
        first = Limits(min((r for r in (self.limits.rank, cap) if r), default=None), self.limits.energy)
        (shrunk, self.tally.kept[name]) = shrink_dense(merged, first)  # type: ignore[arg-type]  # no vector has two dimensions
        return shrunk

    def _truncate(self, layers: Mapping[LayerName, LowRank]) -> dict[LayerName, Mergeable]:
        results = shrink(layers, self.limits, ranks=self.ranks) if layers else {}
        for name, (layer, share) in results.items():
            self.tally.kept[name] = self.tally.kept.get(name, 1.0) * share
            if name not in self.tally.norms:
                self.tally.has_cancelled(name, norm_before(layer, share))
        return {name: layer for name, (layer, _) in results.items()}


def _count(group: Group) -> int:
    return sum(map(count_numbers, group.layers))


def _norm(layer: Mergeable) -> float:
    return norm(layer) if isinstance(layer, LowRank) else float(layer.delta().double().norm())
