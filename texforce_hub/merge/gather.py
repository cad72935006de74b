"""A merge's sources, read and checked, and the layers they share."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.lazy import LazyAdapter
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter, LayerName
from texforce_hub.apply.model import Base, find_weight
from texforce_hub.errors import ConfigError, MergeError, RefError
from texforce_hub.formats.codec.renaming import share_names
from texforce_hub.hub.read import open_adapter
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.stack import Reader, StackEntry, read_stack
from texforce_hub.merge.methods.registry import Context, Mergeable
from texforce_hub.merge.methods.resolve import resolve
from texforce_hub.merge.request import MergeRequest

#: What a recipe calls a source that was no file: such a recipe cannot be replayed.
IN_MEMORY = "(in memory)"


@dataclass(frozen=True, slots=True)
class Group:
    """One layer's changes, from every source that has it, and their weights; sources at weight 0 are left out."""

    name: LayerName
    layers: tuple[Mergeable, ...]
    weights: tuple[float, ...]
    context: Context
    factors: tuple[LowRank, ...] = field(init=False)
    """The changes, where all are of low rank; else nothing."""

    def __post_init__(self) -> None:
        low = tuple(layer for layer in self.layers if isinstance(layer, LowRank))
        object.__setattr__(self, "factors", low if len(low) == len(self.layers) else ())


@dataclass(frozen=True, slots=True)
class Gathered:
    """What goes into a merge. ``groups`` resolves one layer at a time, so that little is dense at once.

    ``entries`` hold the sources; one that is a file is read when it is asked for a layer.
    """

    entries: tuple[StackEntry, ...]
    sources: tuple[str, ...]
    part_weights: AdapterRef
    layer_weights: AdapterRef
    seed: int
    base: Base | None = None
    device: str | torch.device | None = None

    @property
    def names(self) -> tuple[LayerName, ...]:
        """All layers, in the order in which the sources bring them."""
        return tuple(dict.fromkeys(name for entry in self.entries for name in entry.adapter.layers))

    @property
    def labels(self) -> tuple[str, ...]:
        """The sources' labels, unique."""
        return tuple(entry.label for entry in self.entries)

    def weight_of(self, entry: StackEntry, name: LayerName) -> float:
        """A source's own weight of a layer, times that of its part, times that of the layer."""
        return entry.weight.weight_of(name) * self.part_weights.weight_of(name) * self.layer_weights.weight_of(name)

    def groups(self) -> Iterator[Group]:
        """Every layer with what the sources have for it."""
        for name in self.names:
            yield self._group(name)

    def _group(self, name: LayerName) -> Group:
        having = [(i, entry) for i, entry in enumerate(self.entries) if name in entry.adapter.layers]
        weighted = [(i, entry, self.weight_of(entry, name)) for i, entry in having]
        used = [(i, entry, weight) for i, entry, weight in weighted if weight != 0]
        if not all(math.isfinite(weight) for _, _, weight in used):
            raise MergeError(f"{name}: its weights multiplied are not finite; make them smaller")
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        context = Context(int.from_bytes(digest[:7], "big"), tuple(i for i, _, _ in used))
        layers = tuple(self._resolved(i, name) for i, _, _ in used)
        return Group(name, layers, tuple(weight for _, _, weight in used), context)

    def _resolved(self, index: int, name: LayerName) -> Mergeable:
        layer = self.entries[index].content.layers[name]
        if self.device is not None:
            layer = layer.map(lambda tensor: tensor.to(self.device))
        try:
            return resolve(
                name, layer, find_weight(self.base, name, layer.shape) if isinstance(layer, Decomposed) else None
            )
        except MergeError as error:
            raise MergeError(f"{self.entries[index].label}: {error}") from error


def gather(
    request: MergeRequest,
    *,
    base: Base | None = None,
    device: str | torch.device | None = None,
    read: Reader = open_adapter,
) -> Gathered:
    """Read and check everything a merge needs; ``read`` may give outlines where no values are needed.

    Raises:
        MergeError: too many sources for the method, different families or shapes, a pattern that covers no layer.
        DialectError: some sources name a transformer's layers as the authors' code does, others as ``diffusers``
            does, and the former cannot be divided.
    """
    read_entries = read_stack(list(request.sources), read=read)
    contents = share_names([entry.content for entry in read_entries])
    entries = [_renamed(entry, content) for entry, content in zip(read_entries, contents, strict=True)]
    most = request.definition.most
    if most is not None and len(entries) > most:
        raise MergeError(f"{request.method} of {len(entries)} adapters; it is defined for at most {most}")
    _check_families(entries)
    _check_shapes(entries)
    gathered = Gathered(
        entries=tuple(entries),
        sources=tuple(_source_of(item) for item in request.sources),
        part_weights=_pattern_weights("part_weights", request.part_weights),
        layer_weights=_pattern_weights("layer_weights", request.layer_weights),
        seed=request.seed,
        base=base,
        device=device,
    )
    for label, ref in (("part_weights", gathered.part_weights), ("layer_weights", gathered.layer_weights)):
        _check_patterns(label, ref, gathered.names)
    return gathered


def _renamed(entry: StackEntry, content: Adapter | LazyAdapter) -> StackEntry:
    """The entry of an adapter whose layers may have got the names that the others' have."""
    renamed = replace(entry, content=content)
    if content is not entry.content:
        _check_patterns(f"weights of {entry.label}, in diffusers' names", entry.weight, list(renamed.adapter.layers))
    return renamed


def _source_of(item: Any) -> str:
    """A source as the user named it, without its weight."""
    source = item[0] if isinstance(item, tuple) else item
    if isinstance(source, Adapter):
        return IN_MEMORY
    return AdapterRef.parse(source).source if isinstance(source, str) else str(getattr(source, "source", source))


def _pattern_weights(label: str, weights: Mapping[str, float]) -> AdapterRef:
    try:
        return AdapterRef("all", parts=tuple(weights.items()))
    except (RefError, ConfigError, TypeError, OverflowError) as error:
        raise MergeError(f"{label} {weights!s:.200}: {error}") from error


def _check_patterns(label: str, ref: AdapterRef, names: Sequence[LayerName]) -> None:
    for pattern, _ in ref.parts:
        only = AdapterRef("all", parts=((pattern, 0.0),))
        if all(only.weight_of(name) != 0 for name in names):
            raise MergeError(f"{label}: {pattern!r} covers none of the {len(names)} layers, e.g. {names[0]!r}")


def _check_families(entries: Sequence[StackEntry]) -> None:
    known = {entry.adapter.family: entry.label for entry in entries if entry.adapter.family}
    if len(known) > 1:
        (first, label), (second, other), *_ = known.items()
        raise MergeError(f"{label} was made for {first}, {other} for {second}; expected adapters of one family")


def _check_shapes(entries: Sequence[StackEntry]) -> None:
    shapes: dict[LayerName, tuple[str, tuple[int, ...]]] = {}
    for entry in entries:
        for name, layer in entry.adapter.layers.items():
            label, shape = shapes.setdefault(name, (entry.label, layer.shape))
            if shape != layer.shape:
                raise MergeError(
                    f"{name}: {label} changes a weight {shape}, {entry.label} one {layer.shape}; "
                    "expected adapters of one family"
                )
