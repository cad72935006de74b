"""Merge adapters into one: exact where the algebra allows it, honest about what a rank discards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.model import Base
from texforce_hub.errors import MergeError
from texforce_hub.merge.gather import Gathered, gather
from texforce_hub.merge.methods.registry import find_method
from texforce_hub.merge.record import record_merge
from texforce_hub.merge.report import LayerReport, MergeReport
from texforce_hub.merge.resize import Limits
from texforce_hub.merge.run import MergeRun
from texforce_hub.recipe import METADATA_KEY

__all__ = ["LayerReport", "MergeReport", "Merged", "merge_adapters"]


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged adapter and what was done to get it."""

    adapter: Adapter
    report: MergeReport


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
    dtype: torch.dtype | None = None,
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
    """
    chosen = find_method(method)
    settings = chosen.checked(options)
    limits = Limits(rank, energy, None, max_total_rank)
    if chosen.name == "cat" and limits.any:
        raise MergeError("'cat' is the exact sum at the sum of the ranks; for a rank or an energy take 'svd'")
    gathered = gather(
        sources, chosen, part_weights=part_weights, layer_weights=layer_weights, seed=seed, base=base, device=device
    )
    adapter, report = MergeRun(gathered, chosen, settings, limits).run()
    record = record_merge(gathered, chosen.name, settings, limits, part_weights, layer_weights, dtype)
    return Merged(_finished(adapter, gathered, {METADATA_KEY: record}).to(dtype=dtype), report)


def _finished(adapter: Adapter, gathered: Gathered, metadata: Mapping[str, str]) -> Adapter:
    family = next((f for entry in gathered.entries if (f := entry.adapter.family)), None)
    families = {} if family is None else {"texforce_hub.family": family}
    extras = {key: extra for content in reversed(gathered.contents) for key, extra in content.extras.items()}
    return Adapter(adapter.layers, {**families, **metadata}, extras)
