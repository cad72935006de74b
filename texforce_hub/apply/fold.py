"""What is left of a change once it is folded into weights of half precision.

A small change can vanish between two neighbouring numbers: a change of 1e-4 beside weights of 3e-2 loses almost
half of itself in bfloat16. Attached beside the weights nothing is lost.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from texforce_hub.adapter.dense import Vector
from texforce_hub.adapter.lazy import check_is_adapter
from texforce_hub.adapter.tensors import wide
from texforce_hub.adapter.value import Adapter, LayerName
from texforce_hub.apply.model import Base, find_weight
from texforce_hub.apply.rounding import Loss, measure_loss, round_to, seed_for, total_loss
from texforce_hub.device import Dtype, choose_dtype
from texforce_hub.errors import MergeError


@dataclass(frozen=True, slots=True, repr=False)
class Fold:
    """The relative rounding loss of a fold: ``‖(rounded − base) − change‖ / ‖change‖``, of all and by layer."""

    dtype: str
    stochastic: bool
    loss: float
    layers: Mapping[LayerName, float]

    def __repr__(self) -> str:
        how = "stochastic" if self.stochastic else "nearest"
        return f"Fold({self.dtype}, {how}: {self.loss:.2%} of the change lost over {len(self.layers)} layers)"

    def as_dict(self) -> dict[str, Any]:
        """The losses as plain data, ready for JSON."""
        return asdict(self)


def measure_fold(
    adapter: Adapter, base: Base, *, dtype: Dtype = torch.float16, stochastic: bool = False, seed: int = 0
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
        ConfigError: something else than an adapter, or no dtype of this name.

    Example:
        >>> from texforce_hub import load_pipeline, measure_fold, read_adapter
        >>> import torch
        >>> pipeline = load_pipeline("shapes", device="cpu")
        >>> measure_fold(read_adapter("shapes-colour"), pipeline, dtype=torch.float32).loss < 1e-3
        True
    """
    check_is_adapter(adapter)
    kind, losses = choose_dtype(dtype), dict[LayerName, Loss]()
    for name, layer in adapter.layers.items():
        weight = find_weight(base, name, layer.shape)
        if weight is None or tuple(weight.shape) != layer.shape:
            raise MergeError(f"{name}: the adapter changes {layer.shape}; the base has {_shape(weight)}")
        stored = weight.to(kind)
        change = layer.delta(None if isinstance(layer, Vector) else wide(stored)).to(stored.device)
        draws = seed_for(seed, name) if stochastic else None
        losses[name] = measure_loss(stored, round_to(wide(stored) + change, kind, draws), change)
    relative = {name: loss.relative for name, loss in losses.items()}
    return Fold(str(kind).removeprefix("torch."), stochastic, total_loss(losses.values()).relative, relative)


def _shape(weight: Tensor | None) -> object:
    return None if weight is None else tuple(weight.shape)
