"""One run of a merge: a few layers at a time, those of one shape as one batch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from texforce_hub.adapter.algebra import concat, cut, gram
from texforce_hub.adapter.batches import count_numbers, enough_for, in_rounds, lies_on_device, take_together
from texforce_hub.adapter.dense import Dense
from texforce_hub.adapter.factors import factor
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.moving import move_all, read_numbers
from texforce_hub.adapter.sums import Sums, alike
from texforce_hub.adapter.value import Adapter, LayerName
from texforce_hub.merge.gather import Gathered, Group
from texforce_hub.merge.measures import Tally
from texforce_hub.merge.methods.linear import products
from texforce_hub.merge.methods.registry import Mergeable, Terms
from texforce_hub.merge.overflow import check_results, naming_overflow
from texforce_hub.merge.report import MergeReport
from texforce_hub.merge.request import MergeRequest
from texforce_hub.merge.resize import Limits, norms_before, shrink, shrink_dense

_HERE = torch.device("cpu")


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
        some = max(enough_for(entry.content, self.gathered.device) for entry in self.gathered.entries)
        for groups in take_together(self.gathered.groups(), _count, enough=math.inf if self.spends else some):
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
        chunks = alike([group.factors for group in factored])
        for some in in_rounds(chunks, on_device=any(lies_on_device(group.factors) for group in factored)):
            merged.update(self._merge_alike([[factored[index] for index in chunk] for chunk in some]))
        self.tally.removed |= {group.name for group in groups if not group.layers}
        merged.update(self._merge_unlike([group for group in groups if group.layers and not group.factors]))
        late = {n: layer for n, layer in merged.items() if isinstance(layer, LowRank) and self._truncates_late(n)}
        return merged | self._truncate(late)

    def _merge_alike(self, batches: Sequence[Sequence[Group]]) -> dict[LayerName, Mergeable]:
        """Batches of layers of one shape each; a device is waited for once for them, and once more for their ranks."""
        sums = [Sums([group.factors for group in groups]) for groups in batches]
        products = move_all([each.products() for each in sums], _HERE)
        for groups, inner in zip(batches, products):
            self.tally.note_sources(groups, inner)
        if self.method.coefficients is None or self.spends:
            return self._merge_each([pair for groups, inner in zip(batches, products) for pair in zip(groups, inner)])
        weights = [self._weights(groups, inner) for groups, inner in zip(batches, products)]
        if self.method.name == "svd" or self.limits.any:
            return self._combine(batches, sums, weights)
        rows = [row for groups, rows in zip(batches, weights) for row in zip(groups, rows.tolist())]
        return {group.name: concat(group.factors, row) for group, row in rows if self._stays(group)}

    def _weights(self, groups: Sequence[Group], products: Tensor) -> Tensor:
        """The coefficients ``(b, n)`` of a batch's layers, float64; zeros where nothing is left of one."""
        weights = torch.tensor([self._coefficients(*pair) for pair in zip(groups, products)], dtype=torch.float64)
        squares = (weights[:, None, :] @ products @ weights[:, :, None]).flatten()
        for row, (group, length) in enumerate(zip(groups, squares.clamp_min(0).sqrt().tolist())):
            if not self._stays(group) or self.tally.has_cancelled(group.name, length):
                weights[row] = 0
        return weights

    def _combine(
        self, batches: Sequence[Sequence[Group]], sums: Sequence[Sums], weights: Sequence[Tensor]
    ) -> dict[LayerName, Mergeable]:
        """The weighted sums at their ranks; the truncated layers' norms and shares are known then."""
        merged: dict[LayerName, Mergeable] = {}
        factors = factor([each.weigh(rows.to(each.up.device)) for each, rows in zip(sums, weights)])
        for groups, each in zip(batches, factors):
            kernels = [group.factors[0].down.shape[1:] for group in groups]
            choices = [partial(self._rank, group) for group in groups]
            for group, (layer, share) in zip(groups, cut(each, kernels, choices)):
                if self._stays(group):
                    self.tally.kept[group.name] = share
                    self.cut.add(group.name)
                    merged[group.name] = layer
        return merged

    def _stays(self, group: Group) -> bool:
        return group.name not in self.tally.removed

    def _coefficients(self, group: Group, inner: Tensor) -> Sequence[float]:
        assert self.method.coefficients is not None
        return self.method.coefficients(Terms(inner, group.weights, group.context.positions), **self.options)

    def _rank(self, group: Group, values: Tensor) -> int:
        return self.limits.count(values) if self.limits.any else max(layer.rank for layer in group.factors)

    def _merge_unlike(self, groups: Sequence[Group]) -> dict[LayerName, Mergeable]:
        """Layers that are not all of low rank."""
        inner = move_all([products(group.layers) for group in groups], _HERE)
        for group, each in zip(groups, inner):
            self.tally.note_sources([group], each[None])
        return self._merge_each(list(zip(groups, inner)))

    def _merge_each(self, pairs: Sequence[tuple[Group, Tensor]]) -> dict[LayerName, Mergeable]:
        """Layers by themselves, those of which something is left; main memory holds one dense change at a time."""
        staying = [pair for pair in pairs if self._stays(pair[0])]
        if self.method.name == "svd" and not self.limits.any:
            self.ranks |= {g.name: max(layer.rank for layer in g.factors) for g, _ in staying if g.factors}
        done: dict[LayerName, Mergeable] = {}
        for some in in_rounds(staying, on_device=any(lies_on_device(group.layers) for group, _ in staying)):
            merged = {group.name: self._merge(group, inner) for group, inner in some}
            whole = [n for n, layer in merged.items() if not isinstance(layer, LowRank) or not self._truncates_late(n)]
            lengths = dict(zip(whole, read_numbers([_norm(merged[name]) for name in whole])))
            gone = {name for name in whole if self.tally.has_cancelled(name, lengths[name])}
            done |= self._limited({name: layer for name, layer in merged.items() if name not in gone})
        return done

    def _merge(self, group: Group, inner: Tensor) -> Mergeable:
        if self.method.coefficients is not None and group.factors:
            return concat(group.factors, self._coefficients(group, inner))
        return self.method.merge(group.layers, group.weights, self.options, group.context.with_floors(self.floors))

    def _truncates_late(self, name: LayerName) -> bool:
        """Whether a low-rank layer is still to be truncated; its singular values, then known, give its norm."""
        return name not in self.cut and (self.limits.any or name in self.ranks)

    def _limited(self, merged: Mapping[LayerName, Mergeable]) -> dict[LayerName, Mergeable]:
        """Matrices under a limit become low rank at once, so that many dense ones are never held."""
        dense = {name: layer for name, layer in merged.items() if isinstance(layer, Dense) and self.limits.any}
        cap = self.limits.max_total_rank
        first = Limits(min((r for r in (self.limits.rank, cap) if r), default=None), self.limits.energy)
        shrunk = shrink_dense(dense, first)
        self.tally.kept |= {name: share for name, (_, share) in shrunk.items()}
        return {name: shrunk[name][0] if name in shrunk else layer for name, layer in merged.items()}

    def _truncate(self, layers: Mapping[LayerName, LowRank]) -> dict[LayerName, Mergeable]:
        results = shrink(layers, self.limits, ranks=self.ranks) if layers else {}
        for name, (_, share) in results.items():
            self.tally.kept[name] = self.tally.kept.get(name, 1.0) * share
        late = {name: result for name, result in results.items() if name not in self.tally.norms}
        for name, length in norms_before(late).items():
            self.tally.has_cancelled(name, length)
        return {name: layer for name, (layer, _) in results.items()}


def _count(group: Group) -> int:
    return sum(map(count_numbers, group.layers))


def _norm(layer: Mergeable) -> Tensor:
    return gram([layer]).clamp_min(0).sqrt()[0, 0] if isinstance(layer, LowRank) else layer.delta().double().norm()
