"""A merge's recipe, as its result carries it."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from texforce_hub import __version__
from texforce_hub.merge.gather import Gathered
from texforce_hub.recipe import Recipe, RecipeSource
from texforce_hub.resize import Limits
from texforce_hub.stack import Entry


def record_merge(
    gathered: Gathered,
    method: str,
    options: Mapping[str, Any],
    limits: Limits,
    part_weights: Mapping[str, float] | None,
    layer_weights: Mapping[str, float] | None,
    dtype: torch.dtype | None,
) -> str:
    """The recipe of a merge as TOML; nothing in it depends on when or where it ran."""
    settings: dict[str, Any] = {
        "rank": limits.rank,
        "energy": limits.energy,
        "max_total_rank": limits.max_total_rank,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "part_weights": dict(part_weights or {}) or None,
        "layer_weights": dict(layer_weights or {}) or None,
    }
    return str(
        Recipe(
            kind="merge",
            sources=tuple(map(_record_source, gathered.entries, gathered.sources)),
            method=method,
            options={name: value for name, value in options.items() if value is not None},
            settings={name: value for name, value in settings.items() if value is not None},
            seed=gathered.seed,
            versions=versions(),
        )
    )


def versions() -> dict[str, str]:
    """The versions that decide a result's bytes."""
    found = {"texforce_hub": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    try:
        found["safetensors"] = version("safetensors")
    except PackageNotFoundError:
        return found
    return found


def _record_source(entry: Entry, source: str) -> RecipeSource:
    weights = entry.weight
    return RecipeSource(source=source, weight=weights.weight, parts=dict(weights.parts), name=entry.label)
