"""An adapter whose numbers stay in its file: they are read a layer at a time, and none are kept."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch import Tensor

from texforce_hub.adapter import Adapter, Layer, LayerName
from texforce_hub.codec.decoding import decode, decode_layer
from texforce_hub.dialects import Plan

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, eq=False)
class StoredAdapter:
    """``outline`` is the adapter with every tensor on the ``meta`` device; ``layers`` and ``extras`` are the numbers.

    Each look into ``layers`` or ``extras`` reads anew: take one at a time, and memory stays at the largest.
    """

    outline: Adapter
    layers: Mapping[LayerName, Layer]
    extras: Mapping[str, Tensor]


def decode_stored(
    plan: Plan, outlines: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, alpha: float | None = None
) -> StoredAdapter:
    """As :func:`decode`, of tensors that are read when they are asked for; ``outlines`` are their shapes.

    Raises:
        DialectError, AdapterError: as :func:`decode`; what only the numbers tell, when they are read.
    """
    once = {name: replace(layer, twins=()) for name, layer in plan.layers.items()}  # shapes have no values to compare
    outline = decode(replace(plan, layers=once), outlines, alpha=alpha)
    layers = _Read(plan.layers, lambda name: decode_layer(plan.layers[name], tensors, alpha))
    return StoredAdapter(outline, layers, _Read(plan.extras, tensors.__getitem__))


class _Read(Mapping[str, Value], Generic[Value]):
    """Names, and what is read whenever one is asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Value]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
