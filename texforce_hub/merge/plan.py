"""What a merge would do: which files it would read, and how large its result would be."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import LayerName
from texforce_hub.apply.model import Base
from texforce_hub.device import choose_dtype
from texforce_hub.families.order import natural
from texforce_hub.hub.find import find_bundle
from texforce_hub.hub.read import open_adapter
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.merge.gather import IN_MEMORY, Gathered, Group, gather
from texforce_hub.merge.request import MergeRequest


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """One source: its label, the file that would be read, its family, layers and largest rank."""

    label: str
    file: str
    family: str | None
    layers: int
    rank: int | None


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A merge before it is done.

    ranks: of each result layer, at most; ``None`` for a dense one
    size: of the result's tensors in bytes, at most
    """

    method: str
    sources: tuple[PlannedSource, ...]
    ranks: dict[LayerName, int | None]
    size: int

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data, ready for JSON."""
        return asdict(self)


def plan_merge(request: MergeRequest, *, base: Base | None = None) -> MergePlan:
    """What the merge would do; nothing is merged or written.

    Answers from the sources' headers: no tensor is read, so NaN and infinity in one are not seen.

    Raises:
        MergeError: as the merge itself would.
    """
    gathered = gather(request, base=base, device="meta", read=lambda ref: open_adapter(ref, checked=False).outline)
    width = torch.finfo(choose_dtype(request.dtype)).bits // 8
    ranks: dict[LayerName, int | None] = {}
    size = 0
    for group in gathered.groups():
        if group.layers:
            ranks[group.name] = planned = _planned_rank(group, request)
            size += width * _entries(group.layers[0].shape, planned)
    in_order = {name: ranks[name] for name in sorted(ranks, key=natural)}
    return MergePlan(request.method, tuple(_planned_sources(gathered)), in_order, size)


def _planned_rank(group: Group, request: MergeRequest) -> int | None:
    limits = request.limits
    shape = group.layers[0].shape
    ranks = [layer.rank for layer in group.layers if isinstance(layer, LowRank)]
    if len(shape) == 1:
        return None
    small = len(ranks) == len(group.layers) and request.options.get("space") != "dense"
    if not small and not limits.any:
        return None
    bound = min(shape[0], math.prod(shape[1:]))
    exact = sum(ranks) if small else bound
    if request.method == "svd" and not limits.any:
        exact = max(ranks)
    return min(x for x in (exact, bound if limits.any else exact, limits.rank, limits.max_total_rank) if x is not None)


def _entries(shape: tuple[int, ...], rank: int | None) -> int:
    return math.prod(shape) if rank is None else rank * (shape[0] + math.prod(shape[1:]))


def _planned_sources(gathered: Gathered) -> list[PlannedSource]:
    return [
        PlannedSource(
            entry.label,
            source if source == IN_MEMORY else str(find_bundle(AdapterRef(source)).path),
            entry.adapter.family,
            len(entry.adapter.layers),
            max((rank for rank in entry.adapter.ranks.values() if rank is not None), default=None),
        )
        for entry, source in zip(gathered.entries, gathered.sources)
    ]
