"""An adapter whose numbers stay in its file: they are read a layer at a time, and none are kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from torch import Tensor

from texforce_hub.adapter.value import Adapter, Layer, LayerName
from texforce_hub.errors import ConfigError
from texforce_hub.files.lazy_mapping import LazyMapping


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LazyAdapter:
    """``outline`` is the adapter with every tensor on the ``meta`` device; ``layers`` and ``extras`` are the numbers.

    Each look into ``layers`` or ``extras`` reads anew: take one at a time, and memory stays at the largest.
    """

    outline: Adapter
    layers: Mapping[LayerName, Layer]
    extras: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"Lazy{self.outline!r}"

    def weighted(self, weight_of: Callable[[LayerName], float]) -> "LazyAdapter":
        """Every layer's change times the weight that its name has."""

        def weigh(layers: Mapping[LayerName, Layer], name: LayerName) -> Layer:
            return layers[name].scaled(weight_of(name))

        outline = replace(self.outline, layers={name: weigh(self.outline.layers, name) for name in self.outline.layers})
        return replace(self, outline=outline, layers=LazyMapping(self.layers, lambda name: weigh(self.layers, name)))

    def only(self, part: str) -> "LazyAdapter":
        """The layers of one part (``"text_encoder"``), without extras."""
        chosen = self.outline.only(part)
        return LazyAdapter(chosen, LazyMapping(chosen.layers, self.layers.__getitem__), {})


def check_is_adapter(value: Any) -> None:
    """Refuse what is no adapter, with the way to one.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, Adapter | LazyAdapter):
        read = isinstance(value, str | PathLike)
        way_out = f"read it first: read_adapter({str(value)!r:.80})" if read else "give what read_adapter gives"
        inner = isinstance(getattr(value, "adapter", None), Adapter)
        raise ConfigError(f"{type(value).__name__} is no adapter; {'give its .adapter' if inner else way_out}")


def outline_adapter(adapter: Adapter) -> Adapter:
    """The same adapter with every layer's tensors on the ``meta`` device: shapes, dtypes and scales."""
    return replace(adapter, layers={name: layer.map(_outline) for name, layer in adapter.layers.items()})


def _outline(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")
