"""What one layer is stored as: the role of each of its tensors, and the factor that goes into it."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import wide
from texforce_hub.adapter.value import Layer
from texforce_hub.errors import DialectError

Part = tuple[str, Tensor, float]
"""Role, tensor, and the factor that goes into it."""

Tensors = Iterator[Part]


def tensors_of(layer: Layer, alpha: float | None) -> Tensors:
    """Everything that a layer is stored as, beside this ``alpha`` if there is one.

    What alpha does not say of the scale goes into one tensor, its sign always: a negative or zero ``.alpha``
    misleads other readers.
    """
    match layer:
        case Decomposed(inner=inner, magnitude=magnitude, axis=axis, weight=weight):
            if weight != 1.0:
                raise DialectError(f"a DoRA layer at weight {weight:g} has no spelling; write it at weight 1")
            yield from tensors_of(inner, alpha)
            yield _magnitude(magnitude, axis, inner.shape, stores_alpha=alpha is not None)
        case Dense(value=value, scale=scale) | Vector(value=value, scale=scale):
            yield "diff", value, scale
        case LowRank() | Hadamard() | Kronecker():
            fixed = isinstance(layer, Kronecker) and layer.right is not None  # such a layer's alpha says nothing
            said = 1.0 if fixed or alpha is None else alpha / divisor_of(layer)
            factor = layer.scale / said
            if math.isclose(abs(factor), 1.0, rel_tol=2**-23):  # all that a float32 alpha can miss
                factor = math.copysign(1.0, factor)
            yield from _product(layer, factor)
            if alpha is not None:
                yield "alpha", torch.tensor(alpha, dtype=torch.float32), 1.0


def _product(layer: LowRank | Hadamard | Kronecker, factor: float) -> Tensors:
    match layer:
        case LowRank(down=down, up=up):
            yield "down", down, 1.0
            yield "up", up.reshape(*up.shape, *[1] * (down.dim() - 2)), factor
        case Hadamard(up1=up1, down1=down1, up2=up2, down2=down2):
            yield from (("hada_w1_a", up1, factor), ("hada_w1_b", down1.flatten(1), 1.0))
            yield from (("hada_w2_a", up2, 1.0), ("hada_w2_b", down2.flatten(1), 1.0))
        case Kronecker(left=left, right=right, up=up, down=down):
            yield "lokr_w1", left, factor
            if right is not None:
                yield "lokr_w2", right, 1.0
            elif up is not None and down is not None:
                yield from (("lokr_w2_a", up, 1.0), ("lokr_w2_b", down.flatten(1), 1.0))


def divisor_of(layer: LowRank | Hadamard | Kronecker) -> int:
    """What readers divide alpha by; 1 where they ignore it, or where there is no rank and nothing to scale."""
    down = layer.down1 if isinstance(layer, Hadamard) else layer.down
    return 1 if down is None else max(1, down.shape[0])


def _magnitude(
    magnitude: Tensor, axis: str, shape: tuple[int, ...], *, stores_alpha: bool
) -> tuple[str, Tensor, float]:
    """LyCORIS tells the axis by the vector's shape; PEFT knows rows only."""
    ones = [1] * (len(shape) - 2)
    if stores_alpha:
        return "dora", magnitude.reshape((-1, 1, *ones) if axis == "out" else (1, -1, *ones)), 1.0
    if axis != "out":
        raise DialectError("a DoRA layer normed along its inputs has no spelling here; write it as 'kohya'")
    return "magnitude", magnitude.reshape((1, -1, *ones) if ones else (-1,)), 1.0


def fill_up(layer: LowRank, rank: int) -> LowRank:
    """The same change, at least of this rank: new rows and columns are zero."""
    more = rank - layer.rank
    if more <= 0:
        return layer
    down, up = wide(layer.down), wide(layer.up)  # not every version of torch joins fp8
    down = torch.cat([down, down.new_zeros(more, *down.shape[1:])])
    up = torch.cat([up, up.new_zeros(up.shape[0], more)], dim=1)
    return replace(layer, down=down.to(layer.down.dtype), up=up.to(layer.up.dtype))
