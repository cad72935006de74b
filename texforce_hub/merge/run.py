"""One run of a merge: layer by layer, what is low rank truncated a few layers together."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from texforce_hub.adapter.algebra import norm
from texforce_hub.adapter.batches import take_batches
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter, LayerName
from texforce_hub.merge.gather import Gathered, Group
from texforce_hub.merge.methods.linear import products
from texforce_hub.merge.methods.registry import Mergeable
from texforce_hub.merge.methods.spaces import as_low_rank
from texforce_hub.merge.report import LayerReport, MergeReport, kept_share
from texforce_hub.merge.request import MergeRequest
from texforce_hub.merge.resize import Limits, norm_before, shrink

#: A layer whose norm is below this share of its sources' weighted norms has cancelled.
CANCELLED = 1e-6


class MergeRun:
    """One run: merge layer by layer, note norms and cosines, truncate what is low rank, a few layers together."""

    def __init__(self, gathered: Gathered, request: MergeRequest) -> None:
        self.gathered = gathered
        self.method, self.options, self.limits = request.definition, request.options, request.limits
        count = len(gathered.entries)
        self.products = torch.zeros(count, count, dtype=torch.float64)
        self.squares = torch.zeros(count, count, dtype=torch.float64)
        self.norms: dict[LayerName, float] = {}
        self.kept: dict[LayerName, float] = {}
        self.removed: list[LayerName] = []
        self.ranks: dict[LayerName, int] = {}
        self.sizes: dict[LayerName, float] = {}

    def run(self) -> tuple[Adapter, MergeReport]:
        """The merged layers as an adapter without metadata, and the report."""
        done: dict[LayerName, Mergeable] = {}
        # The sum of all ranks is spent over all layers at once; other limits let a few layers go together.
        enough = None if self.limits.max_total_rank is None else math.inf
        for together in take_batches(self._merged(), enough=enough):
            low = {n: layer for n, layer in together.items() if isinstance(layer, LowRank) and self._truncates(n)}
            done.update(together)
            done.update(self._truncate(low))
        layers = {name: done[name] for name in self.gathered.names if name in done and name not in self.removed}
        return Adapter(layers), self._report(layers)

    def _merged(self) -> Iterator[tuple[LayerName, Mergeable]]:
        """The merged layers one by one, not yet truncated together."""
        floors = self._survey()
        for group in self.gathered.groups():
            merged = self._merge(group, floors)
            if merged is not None:
                yield group.name, self._limited(group.name, merged)

    def _survey(self) -> Mapping[int, float] | None:
        """What the method must know of all layers before the first is merged."""
        if self.method.survey is None:
            return None

        def stream() -> Iterator[tuple[tuple[int, ...], Sequence[Mergeable]]]:
            for group in self.gathered.groups():
                if group.layers:
                    yield group.context.positions, group.layers

        return self.method.survey(stream, self.options)

    def _merge(self, group: Group, floors: Mapping[int, float] | None) -> Mergeable | None:
        """The merged layer, or ``None`` if nothing is left of it."""
        size = self._note_products(group)
        if size == 0:
            self.removed.append(group.name)
            return None
        self.sizes[group.name] = size
        merged = self.method.merge(group.layers, group.weights, self.options, group.context.with_floors(floors))
        ranks = [layer.rank for layer in group.layers if isinstance(layer, LowRank)]
        if self.method.name == "svd" and not self.limits.any and len(ranks) == len(group.layers):
            self.ranks[group.name] = max(ranks)
        if isinstance(merged, LowRank) and self._truncates(group.name):
            return merged  # its singular values, soon to be known, give the norm
        return None if self._has_cancelled(group.name, _norm(merged)) else merged

    def _truncates(self, name: LayerName) -> bool:
        return self.limits.any or name in self.ranks

    def _has_cancelled(self, name: LayerName, length: float) -> bool:
        """Note a merged layer's norm; nothing is left of it if that is rounding noise beside its sources."""
        self.norms[name] = length
        cancelled = length <= CANCELLED * self.sizes[name]
        if cancelled:
            self.removed.append(name)
        return cancelled

    def _note_products(self, group: Group) -> float:
        """Add the layer to the sources' inner products; the sum of its weighted norms."""
        if not group.layers:
            return 0.0
        inner = products(group.layers).cpu()
        norms = inner.diagonal().clamp_min(0)
        rows = torch.tensor(group.context.positions)
        self.products[rows[:, None], rows] += inner
        self.squares[rows[:, None], rows] += norms[:, None]
        return math.fsum(abs(w) * math.sqrt(float(n)) for w, n in zip(group.weights, norms))

    def _limited(self, name: LayerName, merged: Mergeable) -> Mergeable:
        """A matrix under a limit becomes low rank at once, so that a dense one is never held."""
        if isinstance(merged, LowRank) or merged.shape[1:] == () or not self.limits.any:
            return merged
        factors = as_low_rank(merged)  # type: ignore[arg-type]  # a vector has no second dimension
        cap = self.limits.max_total_rank
        first = Limits(min((r for r in (self.limits.rank, cap) if r), default=None), self.limits.energy)
        (shrunk, self.kept[name]) = shrink({name: factors}, first)[name]
        return shrunk

    def _truncate(self, layers: dict[LayerName, LowRank]) -> dict[LayerName, LowRank]:
        results = shrink(layers, self.limits, ranks=self.ranks) if layers else {}
        for name, (layer, share) in results.items():
            self.kept[name] = self.kept.get(name, 1.0) * share
            if name not in self.norms:
                self._has_cancelled(name, norm_before(layer, share))
        return {name: layer for name, (layer, _) in results.items()}

    def _report(self, layers: dict[LayerName, Mergeable]) -> MergeReport:
        lengths = (self.squares * self.squares.T).sqrt()
        cosines = torch.where(lengths > 0, self.products / lengths, 0).tolist()
        facts = [
            LayerReport(
                name, type(layer).__name__, layer.rank, self.norms[name], self.kept.get(name, 1.0), self._sources(name)
            )
            for name, layer in layers.items()
        ]
        return MergeReport(
            method=self.method.name,
            labels=self.gathered.labels,
            layers=tuple(facts),
            cosines=tuple(tuple(row) for row in cosines),
            removed=tuple(self.removed),
            warnings=tuple(self._warnings(facts)),
        )

    def _sources(self, name: LayerName) -> tuple[int | None, ...]:
        return tuple(
            entry.adapter.layers[name].rank if name in entry.adapter.layers else 0 for entry in self.gathered.entries
        )

    def _warnings(self, facts: Sequence[LayerReport]) -> Iterator[str]:
        if self.removed:
            yield f"{len(self.removed)} layers cancelled and were removed, e.g. {self.removed[0]}"
        kept = kept_share(facts)
        if kept < 0.9:
            yield f"{1 - kept:.1%} of the merged change was discarded by the rank; a higher rank keeps more"
        if any(fact.kind == "Dense" for fact in facts):
            yield "some layers are dense: nothing is discarded, but the file is large; a rank makes them low rank"
        for key in sorted({key for entry in self.gathered.entries for key in entry.adapter.extras}):
            holders = [entry.label for entry in self.gathered.entries if key in entry.adapter.extras]
            if len(holders) > 1:
                yield f"{key} comes with {', '.join(holders)}; the first one's is kept"


def _norm(layer: Mergeable) -> float:
    return norm(layer) if isinstance(layer, LowRank) else float(layer.delta().double().norm())
