"""Whether an adapter holds NaN or infinity."""

import math
from collections.abc import Mapping

from texforce_hub.adapter.lazy import LazyAdapter
from texforce_hub.adapter.tensors import all_hold_numbers
from texforce_hub.adapter.value import Adapter, Layer, LayerName
from texforce_hub.errors import AdapterError


def check_finite(adapter: Adapter | LazyAdapter) -> None:
    """Refuse NaN and infinity, which would spread through the whole model.

    Raises:
        AdapterError: names the layers that hold any.
    """
    if isinstance(adapter, Adapter):
        broken = find_broken(adapter.layers)
    else:  # a layer at a time: it is not kept
        broken = [name for name, layer in adapter.layers.items() if not is_finite(layer)]
    if broken:
        raise AdapterError(
            f"NaN or infinity in {len(broken)} of {len(adapter.layers)} layers, e.g. {broken[0]!r}; "
            f"the training broke down or the file is damaged"
        )


def is_finite(layer: Layer) -> bool:
    """Whether every number of a layer is finite, its scale included."""
    return not find_broken({"": layer})


def find_broken(layers: Mapping[LayerName, Layer]) -> list[LayerName]:
    """The layers that hold NaN or infinity; a device on which they lie is waited for once."""
    owners = [(name, tensor) for name, layer in layers.items() for tensor in layer.tensors()]
    sound = all_hold_numbers([tensor for _, tensor in owners])
    lost = {name for (name, _), finite in zip(owners, sound, strict=True) if not finite}
    return [n for n, layer in layers.items() if n in lost or not math.isfinite(getattr(layer, "scale", 1.0))]
