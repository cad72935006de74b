"""What a merge notes as it goes: its sources' inner products, the norms of its layers, what cancelled."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from texforce_hub.adapter.value import LayerName
from texforce_hub.families.order import natural
from texforce_hub.merge.gather import Gathered, Group
from texforce_hub.merge.methods.registry import Mergeable
from texforce_hub.merge.report import LayerReport, MergeReport, kept_share

#: A layer whose norm is below this share of its sources' weighted norms has cancelled.
CANCELLED = 1e-6


class Tally:
    """The account of one merge; :meth:`report` closes it."""

    def __init__(self, gathered: Gathered) -> None:
        self.gathered = gathered
        count = len(gathered.entries)
        self.products = torch.zeros(count, count, dtype=torch.float64)
        self.squares = torch.zeros(count, count, dtype=torch.float64)
        self.sizes: dict[LayerName, float] = {}
        self.norms: dict[LayerName, float] = {}
        self.kept: dict[LayerName, float] = {}
        self.removed: set[LayerName] = set()

    def note_sources(self, groups: Sequence[Group], products: Tensor) -> None:
        """The inner products ``(b, n, n)`` of each group's changes; groups with nothing in them are removed."""
        norms = products.diagonal(dim1=1, dim2=2).clamp_min(0)
        lengths = norms.sqrt().tolist()
        members: dict[tuple[int, ...], list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group.context.positions, []).append(index)
            size = math.fsum(abs(w) * length for w, length in zip(group.weights, lengths[index]))
            self.sizes[group.name] = size
            if size == 0:
                self.removed.add(group.name)
        for positions, indices in members.items():
            rows = torch.tensor(positions)
            self.products[rows[:, None], rows] += products[indices].sum(0)
            self.squares[rows[:, None], rows] += norms[indices].sum(0)[:, None]

    def has_cancelled(self, name: LayerName, length: float) -> bool:
        """Note a merged layer's norm; nothing is left of it if that is rounding noise beside its sources."""
        self.norms[name] = length
        cancelled = length <= CANCELLED * self.sizes[name]
        if cancelled:
            self.removed.add(name)
        return cancelled

    def report(self, method: str, layers: Mapping[LayerName, Mergeable]) -> MergeReport:
        """What the merge did."""
        lengths = (self.squares * self.squares.T).sqrt()
        cosines = torch.where(lengths > 0, self.products / lengths, 0).tolist()
        facts = [
            LayerReport(
                name, type(layer).__name__, layer.rank, self.norms[name], self.kept.get(name, 1.0), self._sources(name)
            )
            for name, layer in sorted(layers.items(), key=lambda item: natural(item[0]))
        ]
        return MergeReport(
            method=method,
            labels=self.gathered.labels,
            layers=tuple(facts),
            cosines=tuple(tuple(row) for row in cosines),
            removed=tuple(sorted(self.removed, key=natural)),
            warnings=tuple(self._warnings(facts)),
        )

    def _sources(self, name: LayerName) -> tuple[int | None, ...]:
        return tuple(
            entry.adapter.layers[name].rank if name in entry.adapter.layers else 0 for entry in self.gathered.entries
        )

    def _warnings(self, facts: Sequence[LayerReport]) -> Iterator[str]:
        if self.removed:
            first = next(name for name in self.gathered.names if name in self.removed)
            yield f"{len(self.removed)} layers cancelled and were removed, e.g. {first}"
        kept = kept_share(facts)
        if kept < 0.9:
            yield f"{1 - kept:.1%} of the merged change was discarded by the rank; a higher rank keeps more"
        if any(fact.kind == "Dense" for fact in facts):
            yield "some layers are dense: nothing is discarded, but the file is large; a rank makes them low rank"
        for key in sorted({key for entry in self.gathered.entries for key in entry.adapter.extras}):
            holders = [entry.label for entry in self.gathered.entries if key in entry.adapter.extras]
            if len(holders) > 1:
                yield f"{key} comes with {', '.join(holders)}; the first one's is kept"
