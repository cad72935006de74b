"""Merge adapters into one: exact where the algebra allows it, honest about what a rank discards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.model import Base
from texforce_hub.device import Dtype
from texforce_hub.merge.gather import Gathered, gather
from texforce_hub.merge.record import record_merge
from texforce_hub.merge.report import LayerReport, MergeReport
from texforce_hub.merge.request import MergeRequest
from texforce_hub.merge.run import MergeRun
from texforce_hub.recipe import METADATA_KEY

__all__ = ["LayerReport", "MergeReport", "Merged", "merge_adapters"]


@dataclass(frozen=True, slots=True, repr=False)
class Merged:
    """A merged adapter and what was done to get it."""

    adapter: Adapter
    report: MergeReport

    def __repr__(self) -> str:
        return f"Merged({self.adapter!r},\n       {self.report!r})"

    def _repr_html_(self) -> str:
        return self.adapter._repr_html_() + self.report._repr_html_()


def merge_adapters(
    sources: Any,
    method: str = "svd",
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_total_rank: int | None = None,
    part_weights: Mapping[str, float] | None = None,
    layer_weights: Mapping[str, float] | None = None,
    base: Base | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: Dtype | None = None,
    **options: Any,
) -> Merged:
    """One adapter out of several. A few layers are in hand at a time; of files, only the result is whole in memory.

    Args:
        sources: ``(adapter or reference, weight)`` pairs, a weight being a number or a mapping from parts, blocks
            or patterns to numbers; references may carry their own weight; or a stack as text, ``"A:0.7 + B:-0.3"``.
        method: a name in ``texforce_hub.merge.methods.METHODS``.
        rank: the largest rank of a layer. ``svd`` without any limit takes the largest rank among the sources.
        energy: the smallest rank that keeps this share of a layer's squared norm, in (0, 1].
        max_total_rank: the sum of the ranks, spent where it keeps the most.
        part_weights, layer_weights: factors by part, block or pattern (``{"unet": 0.5}``), on all sources.
        base: pipeline, model or mapping of weights; only DoRA layers need it.
        seed: of the random methods; with the layer's name it decides every draw.
        device: where to compute; where the adapters are by default.
        dtype: of the result; float32 by default.
        options: the method's own.

    Raises:
        MergeError: sources, weights, options or limits that cannot be merged; the message says which.
        AdapterError: NaN or infinity in a source, or numbers that overflow.
        ConfigError: no dtype of this name.

    Example:
        >>> from texforce_hub import merge_adapters
        >>> merged = merge_adapters([("shapes-colour", 0.7), ("shapes-shape", 0.5)], rank=8)
        >>> len(merged.adapter.layers), max(merged.adapter.ranks.values())
        (12, 8)
    """
    request = MergeRequest(
        sources,
        method,
        options,
        rank=rank,
        energy=energy,
        max_total_rank=max_total_rank,
        part_weights=part_weights or {},
        layer_weights=layer_weights or {},
        seed=seed,
        dtype=dtype,
    )
    return run_request(request, base=base, device=device)


def run_request(request: MergeRequest, *, base: Base | None = None, device: str | torch.device | None = None) -> Merged:
    """What is asked for, done; ``base`` and ``device`` as in :func:`merge_adapters`.

    Raises:
        MergeError: as :func:`merge_adapters`, as far as the sources' layers tell.
    """
    gathered = gather(request, base=base, device=device)
    adapter, report = MergeRun(gathered, request).run()
    record = {METADATA_KEY: record_merge(request, gathered)}
    return Merged(_finished(adapter, gathered, record).to(dtype=request.dtype), report)


def _finished(adapter: Adapter, gathered: Gathered, metadata: Mapping[str, str]) -> Adapter:
    family = next((f for entry in gathered.entries if (f := entry.adapter.family)), None)
    families = {} if family is None else {"texforce_hub.family": family}
    extras = {key: extra for entry in reversed(gathered.entries) for key, extra in entry.content.extras.items()}
    return Adapter(adapter.layers, {**families, **metadata}, extras)
