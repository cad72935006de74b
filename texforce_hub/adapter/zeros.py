"""Whether a layer changes anything at all."""

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.value import Layer


def is_zero(layer: Layer) -> bool:
    """Whether a layer surely changes nothing: its scale is 0, or all of one of its factors is."""
    if isinstance(layer, Decomposed):  # its norms change a weight even then
        return False
    return layer.scale == 0 or any(not tensor.float().any() for tensor in layer.tensors())
