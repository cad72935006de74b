"""What is left of a change once it is folded into weights of half precision.

A small change can vanish between two neighbouring numbers: a change of 1e-4 beside weights of 3e-2 loses almost
half of itself in bfloat16. Attached beside the weights nothing is lost.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from texforce_hub.adapter import Adapter, LayerName, Vector, wide
from texforce_hub.errors import MergeError
from texforce_hub.merge.bases import Base, find_weight


@dataclass(frozen=True, slots=True)
class Fold:
    """The relative rounding loss of a fold: ``‖(rounded − base) − change‖ / ‖change‖``, of all and by layer."""

    dtype: str
    stochastic: bool
    loss: float
    layers: Mapping[LayerName, float]

    def as_dict(self) -> dict[str, Any]:
        """The losses as plain data, ready for JSON."""
        return asdict(self)


def measure_fold(
    adapter: Adapter, base: Base, *, dtype: torch.dtype = torch.float16, stochastic: bool = False, seed: int = 0
) -> Fold:
    """What fusing an adapter into a base of ``dtype`` would lose; nothing is written.

    The sum is taken in float32 and rounded once, as fusing does.

    Args:
        base: pipeline, model, or mapping from layer names to weights; weights are read as if stored in ``dtype``.
        stochastic: round up or down at random, by distance: the loss is larger, but right on average, so that
            sums over many weights keep the change.
        seed: of the stochastic rounding.

    Raises:
        MergeError: the base lacks a layer, or its weight has another shape.
    """
    generator = torch.Generator().manual_seed(seed) if stochastic else None
    losses: dict[LayerName, float] = {}
    lost = total = 0.0
    for name, layer in adapter.layers.items():
        weight = find_weight(base, name)
        if weight is None or tuple(weight.shape) != layer.shape:
            raise MergeError(f"{name}: the adapter changes {layer.shape}; the base has {_shape(weight)}")
        stored = weight.to(dtype)
        change = layer.delta(None if isinstance(layer, Vector) else wide(stored)).to(stored.device)
        error = float((_rounded(wide(stored) + change, dtype, generator).double() - stored.double() - change).norm())
        size = float(change.double().norm())
        losses[name] = error / size if size > 0 else 0.0
        lost, total = lost + error**2, total + size**2
    whole = math.sqrt(lost / total) if total > 0 else 0.0
    return Fold(str(dtype).removeprefix("torch."), stochastic, whole, losses)


def _shape(weight: Tensor | None) -> object:
    return None if weight is None else tuple(weight.shape)


def _rounded(values: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    return values.to(dtype) if generator is None else round_stochastically(values, dtype, generator)


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each value as one of its two neighbours in ``dtype``, the nearer the likelier: right on average.

    Draws come from a CPU generator, so that they are the same on every device.
    """
    nearest = values.to(dtype)
    error = values.double() - nearest.double()
    towards = torch.where(error > 0, torch.inf, -torch.inf).to(dtype)
    neighbour = torch.nextafter(nearest, towards)
    chance = error.abs() / (neighbour.double() - nearest.double()).abs()
    draw = torch.rand(values.shape, generator=generator, dtype=torch.float64).to(values.device)
    return torch.where(draw < chance, neighbour, nearest)
