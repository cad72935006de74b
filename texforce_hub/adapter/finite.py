"""Whether an adapter holds NaN or infinity."""

import torch

from texforce_hub.adapter.lazy import LazyAdapter
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
    found = [torch.isfinite(torch.tensor(getattr(layer, "scale", 1.0)))]

    def look(tensor: torch.Tensor) -> torch.Tensor:
        found.append(torch.isfinite(tensor.float()).all().cpu())
        return tensor

    layer.map(look)
    return all(map(bool, found))
