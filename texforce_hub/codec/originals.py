"""Layers that are named as in the authors' own code, under ``diffusers``' names: fused ones by their rows.

Files of kohya's layout keep the original names; readers of the libraries' own layouts know ``diffusers``' only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from texforce_hub.adapter import Adapter, Dense, Kronecker, Layer, LayerName, take_rows
from texforce_hub.codec.stored import StoredAdapter
from texforce_hub.errors import AdapterError, DialectError, FamilyError
from texforce_hub.families.originals import Ranges, find_rows
from texforce_hub.lazy import LazyMapping

_LIBRARIES = ("diffusers", "diffusers-layers", "peft")
"""The layouts whose readers know no other names than ``diffusers``'."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """What a layer is written from: a layer of the adapter, and which of its rows (``None``: it, as it is)."""

    source: LayerName
    ranges: Ranges | None = None

    def take(self, layers: Mapping[LayerName, Layer]) -> Layer:
        layer = layers[self.source]
        if self.ranges is None:
            return layer
        return take_rows(layer, self.ranges).map(lambda tensor: tensor.clone())  # no file holds one tensor twice


def rename_originals(adapter: Adapter, dialect: str) -> Adapter:
    """The same changes under names that this layout's readers know.

    Raises:
        DialectError: a layer that cannot be renamed or divided exactly.
    """
    pieces = _find_pieces(adapter.layers, dialect)
    if not any(piece.ranges for piece in pieces.values()):
        return adapter
    return replace(adapter, layers={name: _checked(piece, adapter.layers, dialect) for name, piece in pieces.items()})


def rename_stored(adapter: StoredAdapter, dialect: str) -> StoredAdapter:
    """As :func:`rename_originals`, of an adapter that stays in its file.

    Raises:
        DialectError: as :func:`rename_originals`.
    """
    outline = rename_originals(adapter.outline, dialect)
    if outline is adapter.outline:
        return adapter
    pieces = _find_pieces(adapter.outline.layers, dialect)
    return replace(adapter, outline=outline, layers=LazyMapping(pieces, lambda name: pieces[name].take(adapter.layers)))


def _find_pieces(layers: Mapping[LayerName, Layer], dialect: str) -> dict[LayerName, _Piece]:
    pieces: dict[LayerName, _Piece] = {}
    for source, layer in layers.items():
        part, _, path = source.partition(".")
        try:
            is_library = dialect in _LIBRARIES and part == "transformer"
            rows = find_rows(path, layer.shape) if is_library else ()
        except FamilyError as error:
            raise DialectError(f"{dialect}: {error}; write it as 'kohya'") from error
        named = {f"{part}.{found.path}": _Piece(source, found.ranges) for found in rows} or {source: _Piece(source)}
        if twice := named.keys() & pieces.keys():
            raise DialectError(f"{dialect}: {pieces[min(twice)].source} and {source} are both {min(twice)} there")
        pieces |= named
    return pieces


def _checked(piece: _Piece, layers: Mapping[LayerName, Layer], dialect: str) -> Layer:
    try:
        found = piece.take(layers)
    except AdapterError as error:
        raise DialectError(f"{dialect}: {piece.source}: {error}; write it as 'kohya'") from error
    if isinstance(found, Dense) and isinstance(layers[piece.source], Kronecker):
        raise DialectError(
            f"{dialect}: {piece.source} is a full Kronecker product whose factors do not divide as its rows do; "
            "write it as 'kohya', or extract a low-rank approximation first"
        )
    return found
