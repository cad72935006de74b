"""Whether an adapter holds NaN or infinity."""

import math

from texforce_hub.adapter.lazy import LazyAdapter
from texforce_hub.adapter.tensors import holds_numbers
from texforce_hub.adapter.value import Adapter, Layer
from texforce_hub.errors import AdapterError


def check_finite(adapter: Adapter | LazyAdapter) -> None:
    """Refuse NaN and infinity, which would spread through the whole model.

    Raises:
        AdapterError: names the layers that hold any.
    """
    broken = [name for name, layer in adapter.layers.items() if not is_finite(layer)]
    if broken:
        raise AdapterError(
            f"NaN or infinity in {len(broken)} of {len(adapter.layers)} layers, e.g. {broken[0]!r}; "
            f"the training broke down or the file is damaged"
        )


def is_finite(layer: Layer) -> bool:
    """Whether every number of a layer is finite, its scale included."""
    return math.isfinite(getattr(layer, "scale", 1.0)) and all(map(holds_numbers, layer.tensors()))
