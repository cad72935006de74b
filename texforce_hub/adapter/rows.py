"""The part of a layer that changes some rows of its weight."""

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
from texforce_hub.errors import AdapterError
from texforce_hub.families.original_transformer import Ranges


def take_rows(layer: Layer, ranges: Ranges) -> Layer:
    """The layer that changes only these rows of the weight, in this order: its delta is ``delta()[rows]``, exactly.

    A Kronecker product whose factors the ranges cut through becomes low rank, or dense where it is stored in full.

    Raises:
        AdapterError: some rows of a DoRA layer that is normed over all of them, or whose inner change becomes dense.
    """
    if ranges == ((0, layer.shape[0]),):
        return layer
    match layer:
        case LowRank():
            return replace(layer, up=_pick(layer.up, ranges))
        case Hadamard():
            return replace(layer, up1=_pick(layer.up1, ranges), up2=_pick(layer.up2, ranges))
        case Dense() | Vector():
            return replace(layer, value=_pick(layer.value, ranges))
        case Kronecker():
            return _take_kronecker(layer, ranges)
        case Decomposed():
            return _take_decomposed(layer, ranges)


def _take_kronecker(layer: Kronecker, ranges: Ranges) -> Kronecker | LowRank | Dense:
    height = layer.shape[0] // layer.left.shape[0]
    if all(bound % height == 0 for bounds in ranges for bound in bounds):
        blocks = tuple((start // height, end // height) for start, end in ranges)
        return replace(layer, left=_pick(layer.left, blocks))
    expanded = layer.low_rank()
    if expanded is not None:
        return replace(expanded, up=_pick(expanded.up, ranges))
    return Dense(_pick(layer.delta(), ranges))


def _take_decomposed(layer: Decomposed, ranges: Ranges) -> Decomposed:
    inner = take_rows(layer.inner, ranges)
    if not isinstance(inner, LowRank | Hadamard | Kronecker):
        raise AdapterError("a DoRA layer around a full Kronecker product cannot be divided between layers exactly")
    if layer.axis == "out":
        return replace(layer, inner=inner, magnitude=_pick(layer.magnitude.reshape(-1), ranges))
    if inner.shape[0] != layer.shape[0]:
        raise AdapterError(
            "a DoRA layer normed along its inputs, over the rows of several layers, cannot be divided between them"
        )
    return replace(layer, inner=inner)


def _pick(tensor: Tensor, ranges: Ranges) -> Tensor:
    pieces = [tensor[start:end] for start, end in ranges]
    # widened because not every version of torch joins fp8
    return pieces[0] if len(pieces) == 1 else torch.cat([wide(piece) for piece in pieces]).to(tensor.dtype)
