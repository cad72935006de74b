"""A recipe done again: to make its result, or to see whether a result is what its recipe gives."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from texforce_hub.adapter.tensors import wide
from texforce_hub.adapter.value import Adapter, Layer, LayerName
from texforce_hub.apply.model import Base
from texforce_hub.errors import RecipeError
from texforce_hub.files.hashing import hash_files
from texforce_hub.formats.codec.renaming import share_names
from texforce_hub.hub.find import find_bundle
from texforce_hub.hub.read import open_adapter
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.merge.gather import IN_MEMORY
from texforce_hub.merge.merge import Merged, run_request
from texforce_hub.merge.request import MergeRequest
from texforce_hub.reading import read_text
from texforce_hub.recipe import METADATA_KEY, Recipe, RecipeSource

_SETTINGS: dict[str, type | tuple[type, ...]] = {
    "rank": int,
    "energy": (int, float),
    "max_total_rank": int,
    "dtype": str,
    "part_weights": Mapping,
    "layer_weights": Mapping,
}


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether a result is what its recipe gives.

    difference: the largest relative difference of a layer's change
    tolerance: what the rounding of the result's dtype allows
    missing, extra: layers that only the recipe gives, that only the result has
    """

    same: bool
    difference: float
    tolerance: float
    worst: LayerName
    missing: tuple[LayerName, ...]
    extra: tuple[LayerName, ...]

    def as_dict(self) -> dict[str, Any]:
        """The answer as plain data, ready for JSON."""
        return asdict(self)


def run_recipe(recipe: Recipe, *, base: Base | None = None, device: str | torch.device | None = None) -> Merged:
    """Merge what a recipe names, the way it says; its files are read, and nothing is written.

    Raises:
        RecipeError: not a merge, a source that is not what it was, or a setting that does not exist.
        MergeError: a method or an option that does not exist.
    """
    return run_request(request_of(recipe), base=base, device=device)


def request_of(recipe: Recipe) -> MergeRequest:
    """What a recipe asks for, its sources checked.

    Raises:
        RecipeError, MergeError: as :func:`run_recipe`.
    """
    if recipe.kind != "merge":
        raise RecipeError(f"a recipe of kind {recipe.kind!r}; expected 'merge'")
    for name, value in recipe.settings.items():
        if name not in _SETTINGS or isinstance(value, bool) or not isinstance(value, _SETTINGS[name]):
            raise RecipeError(f"the recipe sets {name} = {value!r}; a merge has {', '.join(_SETTINGS)}")
    settings: dict[str, Any] = dict(recipe.settings)
    sources = [_checked_ref(source) for source in recipe.sources]
    return MergeRequest(sources, recipe.method, recipe.options, seed=recipe.seed, **settings)


def _checked_ref(source: RecipeSource) -> AdapterRef:
    if source.source == IN_MEMORY:
        raise RecipeError(f"source {source.name!r} was an adapter in memory: the recipe cannot be replayed")
    ref = AdapterRef(source.source, weight=source.weight, parts=tuple(source.parts.items()))
    if source.sha256 and (digest := hash_files(find_bundle(ref).files)) != source.sha256:
        raise RecipeError(
            f"{source.source}: its sha256 is {digest[:12]}…, the recipe's {source.sha256[:12]}…; it changed"
        )
    return ref


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML file, or in the metadata of an adapter file.

    Raises:
        RecipeError: there is none, or it cannot be read.
    """
    if str(path).endswith(".toml"):
        return Recipe.parse(read_text(path, error=RecipeError))
    return recipe_of(open_adapter(path, checked=False).outline, str(path))


def recipe_of(adapter: Adapter, label: str = "the adapter") -> Recipe:
    """The recipe that an adapter carries.

    Raises:
        RecipeError: it carries none.
    """
    text = adapter.metadata.get(METADATA_KEY)
    if text is None:
        raise RecipeError(f"{label} carries no recipe; only results of merge do")
    return Recipe.parse(text)


def verify_merge(
    path: str | Path, *, base: Base | None = None, device: str | torch.device | None = None
) -> Verification:
    """Run a result's recipe again and compare, layer by layer; the file's layers are read as they are compared.

    Raises:
        RecipeError: the file carries no recipe, or a source is not what it was.

    Example:
        >>> from texforce_hub import merge_adapters, verify_merge, write_adapter
        >>> merged = merge_adapters([("shapes-colour", 0.7), ("shapes-shape", 0.5)], rank=8)
        >>> verify_merge(write_adapter(merged.adapter, "both.safetensors")).same
        True
    """
    read = open_adapter(path, device=device)
    result = run_recipe(recipe_of(read.outline, str(path)), base=base, device=device).adapter
    stored, again = share_names([read, result])
    distances = {
        name: _distance(stored.layers[name], layer) for name, layer in again.layers.items() if name in stored.layers
    }
    worst = max(distances, key=lambda name: distances[name], default="")
    tolerance = max(map(_rounding, read.outline.layers.values()), default=0.0)
    missing = tuple(name for name in again.layers if name not in stored.layers)
    extra = tuple(name for name in stored.layers if name not in again.layers)
    difference = distances.get(worst, 0.0)
    same = difference <= tolerance and not missing and not extra
    return Verification(same, difference, tolerance, worst, missing, extra)


def _distance(stored: Layer, again: Layer) -> float:
    if stored.shape != again.shape:
        return float("inf")
    wanted = wide(again.delta())
    size = float(wanted.norm())
    apart = float((stored.delta().to(wanted.device) - wanted).norm())
    return apart / size if size > 0 else float(apart > 0)


def _rounding(layer: Layer) -> float:
    """What storing a layer in its dtype may change, relative to its norm."""
    return max(1e-5, 2 * max(torch.finfo(tensor.dtype).eps for tensor in layer.tensors()))
