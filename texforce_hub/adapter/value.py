"""The value in the middle: a frozen mapping from layer names to changes."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.equality import same, same_bits
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.moving import move_all, move_layers
from texforce_hub.adapter.tensors import narrow
from texforce_hub.device import Dtype, given_dtype
from texforce_hub.errors import AdapterError
from texforce_hub.families.names import part_of
from texforce_hub.families.recognition import FamilyVerdict, recognize_family
from texforce_hub.notebook import Bar, Cell, table, write_size

LayerName = str

Layer = LowRank | Dense | Vector | Hadamard | Kronecker | Decomposed


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Adapter:
    """Changes of a pipeline's weights, by layer name; never changed after it is made.

    Two are equal if they hold the same: layers, metadata and extras, to the bit.

    ``metadata`` is what the file said of itself, ``extras`` what came along and is no layer (bundled
    embeddings). Python cannot freeze a tensor's contents: treat them as read-only.

    Raises:
        AdapterError: a name without a part (``text_encoder.`` …), something that is no layer, or metadata that is
            no text.
    """

    layers: Mapping[LayerName, Layer]
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            if not isinstance(layer, Layer):
                raise AdapterError(f"layer {name!r} is a {type(layer).__name__}; expected one of {_kinds()}")
            if "." not in name:
                raise AdapterError(f"layer name {name!r} names no part; expected e.g. 'text_encoder.{name}'")
        _check_text(self.metadata)
        for attribute in ("layers", "metadata", "extras"):
            object.__setattr__(self, attribute, MappingProxyType(dict(getattr(self, attribute))))

    def __repr__(self) -> str:
        """One line: family, layers by part, ranks, size; never the tensors."""
        parts = Counter(map(part_of, self.layers))
        ranks = _show_ranks(self.layers.values())
        facts = [self.family or "family unknown", *(f"{part}: {count} layers" for part, count in parts.items())]
        facts += [f"rank{'s' if ' ' in ranks else ''} {ranks}"] if ranks else []
        return f"Adapter({', '.join([*facts, write_size(_size(self.layers.values()))])})"

    def _repr_html_(self) -> str:
        """A notebook's table: a row for each part, with its layers, ranks and size."""
        total = max(1, _size(self.layers.values()))
        rows: list[tuple[Cell, ...]] = []
        for part in self.parts:
            layers = [layer for name, layer in self.layers.items() if part_of(name) == part]
            kinds = ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers))
            size = _size(layers)
            rows.append((part, str(len(layers)), kinds, _show_ranks(layers), Bar(write_size(size), size / total)))
        title = f"Adapter, {self.family or 'family unknown'}, {write_size(_size(self.layers.values()))}"
        return table(title, ("part", "layers", "kind", "rank", "size"), rows)

    def __eq__(self, other: object) -> bool:
        """Whether another adapter holds the same; names and shapes are looked at before numbers."""
        if not isinstance(other, Adapter):
            return NotImplemented
        if self is other:
            return True
        if (
            self._outline != other._outline
            or self.metadata != other.metadata
            or self.extras.keys() != other.extras.keys()
        ):
            return False
        alike = (same(layer, other.layers[name]) for name, layer in self.layers.items())
        return all(alike) and all(same_bits(extra, other.extras[key]) for key, extra in self.extras.items())

    def __hash__(self) -> int:
        """Of names and shapes alone: equal adapters have equal ones."""
        return hash(self._outline)

    @property
    def _outline(self) -> frozenset[tuple[LayerName, str, tuple[int, ...]]]:
        return frozenset((name, type(layer).__name__, layer.shape) for name, layer in self.layers.items())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as it is made: from its layers, metadata and extras."""
        return type(self), (dict(self.layers), dict(self.metadata), dict(self.extras))

    @property
    def parts(self) -> tuple[str, ...]:
        """The pipeline parts it changes, in the order of the layers: ``text_encoder``, ``unet`` …"""
        return tuple(dict.fromkeys(part_of(name) for name in self.layers))

    @property
    def ranks(self) -> Mapping[LayerName, int | None]:
        """Every layer's rank; ``None`` where a layer has none (dense changes, vectors)."""
        return MappingProxyType({name: layer.rank for name, layer in self.layers.items()})

    @property
    def family(self) -> str | None:
        """The base family, as the reader established it; ``None`` if it is ambiguous or unknown.

        :attr:`family_verdict` tells the two apart.
        """
        return self.metadata.get("texforce_hub.family")

    @property
    def family_verdict(self) -> FamilyVerdict:
        """Every family that the layers fit, with the evidence: names and shapes first, metadata second.

        ``candidates`` holds several where the layers do not tell (CLIP-L alone: SD1.x, or SDXL's part 1), none where
        no known family fits; ``summary`` says it in words.

        Raises:
            DialectError: the metadata claims to hold PEFT's settings and cannot be read.
        """
        return recognize_family({name: layer.shape for name, layer in self.layers.items()}, self.metadata)

    def delta(self, name: LayerName, base: Tensor | None = None) -> Tensor:
        """The dense change of one layer; ``base`` is its weight in the model, which only DoRA layers need.

        Raises:
            AdapterError: there is no such layer, or it needs ``base``.
        """
        if name not in self.layers:
            raise AdapterError(
                f"no layer {name!r}; the adapter has {len(self.layers)}, e.g. {next(iter(self.layers), None)!r}"
            )
        return self.layers[name].delta(base)

    def scaled(self, weight: float) -> "Adapter":
        """Every change times ``weight``."""
        return replace(self, layers={name: layer.scaled(weight) for name, layer in self.layers.items()})

    def only(self, part: str) -> "Adapter":
        """The layers of one part (``"text_encoder"``), without extras."""
        chosen = {n: layer for n, layer in self.layers.items() if part_of(n) == part}
        return replace(self, layers=chosen, extras={})

    def to(self, device: str | torch.device | None = None, dtype: Dtype | None = None) -> "Adapter":
        """The same adapter on another device, in another dtype.

        Raises:
            AdapterError: a value that the dtype cannot hold.
            ConfigError: no dtype of this name.
        """
        kind = given_dtype(dtype)
        layers, extras = dict(self.layers), dict(self.extras)
        if kind is not None:
            layers = {name: layer.map(partial(narrow, dtype=kind, name=name)) for name, layer in layers.items()}
        if device is not None:
            layers = move_layers(layers, torch.device(device))
            extras = dict(zip(extras, move_all(list(extras.values()), torch.device(device)), strict=True))
        return replace(self, layers=layers, extras=extras)


def _show_ranks(layers: Iterable[Layer]) -> str:
    ranks = sorted({layer.rank for layer in layers if layer.rank is not None})
    return "" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _size(layers: Iterable[Layer]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in layer.tensors())


def _kinds() -> str:
    return ", ".join(kind.__name__ for kind in (LowRank, Dense, Vector, Hadamard, Kronecker, Decomposed))


def _check_text(metadata: Mapping[Any, Any]) -> None:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise AdapterError(f"metadata {key!r:.80} is {value!r:.80}; expected text as key and as value")
