"""A merge's recipe, as its result carries it."""

import platform
from functools import cache
from importlib.metadata import version

import torch

from texforce_hub import __version__
from texforce_hub.files.hashing import hash_files
from texforce_hub.hub.find import find_bundle, pin_source
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.stack import StackEntry
from texforce_hub.merge.gather import IN_MEMORY, Gathered
from texforce_hub.merge.request import MergeRequest
from texforce_hub.recipe import Recipe, RecipeSource


def record_merge(request: MergeRequest, gathered: Gathered) -> str:
    """The recipe of a merge as TOML; nothing in it depends on when or where it ran."""
    return str(
        Recipe(
            kind="merge",
            sources=tuple(map(_record_source, gathered.entries, gathered.sources)),
            method=request.method,
            options={name: value for name, value in request.options.items() if value is not None},
            settings=request.settings,
            seed=request.seed,
            versions=versions(),
        )
    )


def versions() -> dict[str, str]:
    """The versions that decide a result's bytes."""
    return {
        "texforce_hub": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "safetensors": _version_of("safetensors"),
    }


@cache
def _version_of(package: str) -> str:
    return version(package)  # it reads and parses the package's files each time


def _record_source(entry: StackEntry, source: str) -> RecipeSource:
    weights, revision, sha256 = entry.weight, "", ""
    if source != IN_MEMORY:
        bundle = find_bundle(AdapterRef(source))
        source, revision = pin_source(source, bundle.path)
        sha256 = hash_files(bundle.files)
    return RecipeSource(source, weights.weight, dict(weights.parts), entry.label, revision, sha256)
