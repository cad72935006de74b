"""Layers that are named as in the authors' own code, under ``diffusers``' names: fused ones by their rows.

Files of kohya's layout keep the original names; readers of the libraries' own layouts know ``diffusers``' only.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from texforce_hub.adapter.dense import Dense
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.lazy import LazyAdapter
from texforce_hub.adapter.rows import take_rows
from texforce_hub.adapter.value import Adapter, Layer, LayerName
from texforce_hub.errors import AdapterError, DialectError, FamilyError
from texforce_hub.families.names import part_of, path_of
from texforce_hub.families.original_transformer import Ranges, find_rows
from texforce_hub.files.lazy_mapping import LazyMapping

_LIBRARIES = ("diffusers", "diffusers-layers", "peft")
"""The layouts whose readers know no other names than ``diffusers``'."""

_BLOCKS = ("transformer.transformer_blocks.", "transformer.single_transformer_blocks.")

Either = TypeVar("Either", bound=Adapter | LazyAdapter)


@dataclass(frozen=True, slots=True)
class _Piece:
    """What a layer is made of: a layer of the adapter, and which of its rows (``None``: it, as it is)."""

    source: LayerName
    ranges: Ranges | None = None

    def take(self, layers: Mapping[LayerName, Layer]) -> Layer:
        layer = layers[self.source]
        if self.ranges is None:
            return layer
        return take_rows(layer, self.ranges).map(lambda tensor: tensor.clone())  # no file holds one tensor twice


def fit_names(adapter: Either, dialect: str) -> Either:
    """The same changes under names that this layout's readers know.

    Raises:
        DialectError: a layer that cannot be renamed or divided exactly.
    """
    if dialect not in _LIBRARIES:
        return adapter
    try:
        return rename_originals(adapter)
    except DialectError as error:
        raise DialectError(f"{dialect}: {error}; write it as 'kohya'") from error


def share_names(adapters: Sequence[Adapter | LazyAdapter]) -> list[Adapter | LazyAdapter]:
    """The same adapters, in which a layer has one name: ``diffusers``', where some have it and some the original.

    Raises:
        DialectError: a layer that cannot be renamed or divided exactly.
    """
    plain = {name for adapter in adapters for name in adapter.layers}
    originals = [_library_names(_outline(adapter).layers) for adapter in adapters]
    mixed = any(names & plain for names in originals)
    return [rename_originals(adapter) if mixed and names else adapter for adapter, names in zip(adapters, originals)]


def _library_names(layers: Mapping[LayerName, Layer]) -> set[LayerName]:
    """What ``diffusers`` calls the layers that have other names here, as far as it can be told."""
    names: set[LayerName] = set()
    for name in layers:
        with suppress(FamilyError):
            names |= {target for target, _ in _find_targets(name, layers)}
    return names


def rename_originals(adapter: Either) -> Either:
    """The same changes under ``diffusers``' names; the adapter itself if it has no others.

    Raises:
        DialectError: a layer that cannot be renamed or divided exactly.
    """
    outline = _outline(adapter)
    pieces = _find_pieces(outline.layers)
    if not any(piece.ranges for piece in pieces.values()):
        return adapter
    layers = {name: _take(piece, outline.layers) for name, piece in pieces.items()}
    if isinstance(adapter, Adapter):
        return replace(adapter, layers=layers)
    contents = LazyMapping(pieces, lambda name: pieces[name].take(adapter.layers))
    return replace(adapter, outline=replace(outline, layers=layers), layers=contents)


def _outline(adapter: Adapter | LazyAdapter) -> Adapter:
    return adapter if isinstance(adapter, Adapter) else adapter.outline


def _find_pieces(layers: Mapping[LayerName, Layer]) -> dict[LayerName, _Piece]:
    pieces: dict[LayerName, _Piece] = {}
    for source in layers:
        try:
            named = {name: _Piece(source, ranges) for name, ranges in _find_targets(source, layers)}
        except FamilyError as error:
            raise DialectError(str(error)) from error
        named = named or {source: _Piece(source)}
        if twice := named.keys() & pieces.keys():
            raise DialectError(f"{pieces[min(twice)].source} and {source} are both {min(twice)} in diffusers' names")
        pieces |= named
    return pieces


def _find_targets(name: LayerName, layers: Mapping[LayerName, Layer]) -> list[tuple[LayerName, Ranges]]:
    """Other names of a layer, and which of its rows each has; none where it has no other."""
    part, path = part_of(name), path_of(name)
    if part != "transformer" or ("blocks." not in path and any(other.startswith(_BLOCKS) for other in layers)):
        return []  # img_in beside diffusers' blocks is a layer of a model that diffusers names so
    return [(f"{part}.{target.path}", target.ranges) for target in find_rows(path, layers[name].shape)]


def _take(piece: _Piece, layers: Mapping[LayerName, Layer]) -> Layer:
    try:
        taken = piece.take(layers)
    except AdapterError as error:
        raise DialectError(f"{piece.source}: {error}") from error
    if isinstance(taken, Dense) and isinstance(layers[piece.source], Kronecker):
        raise DialectError(
            f"{piece.source} is a full Kronecker product whose factors do not divide as diffusers divides its rows"
        )
    return taken
