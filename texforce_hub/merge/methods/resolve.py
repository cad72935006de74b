"""Every kind of layer as one that methods can merge, exactly."""

from torch import Tensor

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Layer
from texforce_hub.errors import MergeError
from texforce_hub.merge.methods.registry import Mergeable


def resolve(name: str, layer: Layer, base: Tensor | None = None) -> Mergeable:
    """The same change as a low-rank, a dense or a vector layer.

    LoHa and LoKr expand to factors where that is smaller than the dense change. DoRA becomes dense.

    Raises:
        MergeError: a DoRA layer without the base's weight it depends on.
    """
    if isinstance(layer, LowRank | Dense | Vector):
        return layer
    if isinstance(layer, Decomposed):
        if base is None:
            raise MergeError(f"{name} is a DoRA layer, its change depends on the base's weight: give base= (--base)")
        return Dense(layer.delta(base))
    return _expanded(layer)


def _expanded(layer: Hadamard | Kronecker) -> LowRank | Dense:
    small = layer.rank is not None and layer.rank < min(layer.shape[:2])
    expanded = layer.low_rank() if small else None
    return Dense(layer.delta()) if expanded is None else expanded
