"""Whether the adapters in a saved file were live or had been fused into its weights before it was saved.

The file does not say so. With the base it is measured; without it, estimated: a change that was fused lies in the
weights, so that their product with it is as large as the change's square, times the scale; of weights that do not
have it the product is chance. How large chance is, is known, and an estimate that it could turn over is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.tensors import wide
from texforce_hub.adapter.value import Layer
from texforce_hub.errors import PipelineError
from texforce_hub.formats.live import LiveState

Reading = Literal["live", "fused"]
_BETWEEN = 0.3  # of the change in the weights: below it live, above it fused, where nothing but the file is known
_ERRORS = 3.0  # standard errors that an estimate must be away from it
_MEASURED = 0.1  # as _BETWEEN, where the base is known
_MISFIT = 0.25  # of the changes' square, that a base may leave unexplained


@dataclass(frozen=True)
class Verdict:
    """How a file's adapters lie: ``scale`` times their change is in its weights already; ``certain`` with a base.

    ``error`` is the standard error of the scale.
    """

    reading: Reading
    scale: float = 0.0
    error: float = 0.0
    certain: bool = False

    @property
    def is_once(self) -> bool:
        """Whether the change may lie in the weights exactly as it is, and not weaker or stronger."""
        return abs(self.scale - 1) <= _ERRORS * self.error + 0.05


def judge(live: LiveState, changes: Mapping[str, list[Layer]], base: Mapping[str, Tensor] | None) -> Verdict:
    """Whether the adapters were live or had been fused, at whatever scale, when the state was saved.

    Raises:
        PipelineError: the weights are neither those of the base nor those with the adapters fused into it, or, without
            a base, cannot tell.
    """
    if base is not None:
        return _compare(live, changes, base)
    if not any(_moves(live.base[name], layers) for name, layers in changes.items()):
        return Verdict("live", certain=True)  # nothing to tell apart
    if any(isinstance(layer, Decomposed) for layers in changes.values() for layer in layers):
        return _guess_decomposed(live, changes)
    return _guess(live, changes)


def _compare(live: LiveState, changes: Mapping[str, list[Layer]], base: Mapping[str, Tensor]) -> Verdict:
    """By least squares over all layers: ``weight − base = scale · change``."""
    product = square = rest = 0.0
    for name, layers in changes.items():
        if name not in base or base[name].shape != live.base[name].shape:
            raise PipelineError(
                f"the base has no {name} of shape {tuple(live.base[name].shape)}; give the one it is of"
            )
        change, moved = _total(layers, base[name]), wide(live.base[name]) - wide(base[name])
        product, square = product + _dot(moved, change), square + _dot(change, change)
        rest += _dot(moved, moved)
    scale = product / square if square else 0.0
    misfit = rest - scale * product
    rounding = sum(_rounding(base[name], live.base[name]) for name in changes)
    if misfit > _MISFIT * square + rounding:
        raise PipelineError(
            "its weights are neither the base's nor the base's with the adapters fused; give the base it was trained on"
        )
    return Verdict("fused" if abs(scale) > _MEASURED else "live", scale, certain=True)


def _guess(live: LiveState, changes: Mapping[str, list[Layer]]) -> Verdict:
    """By the mean over the layers of the scale at which each change lies in its weight, the surest weighing most."""
    scales, errors = [], []
    for name, layers in changes.items():
        weight = wide(live.base[name])
        change = _total(layers, weight)
        if weight.dim() > 1 and (square := _dot(change, change)) > 0:
            scales.append(_dot(weight, change) / square)
            errors.append(math.sqrt(_dot(weight, weight) / weight.numel() / square))
    if not scales:  # only biases are changed
        raise _undecided("nothing in them tells")
    inverse = [error**-2 for error in errors]
    scale = sum(map(float.__mul__, inverse, scales)) / sum(inverse)
    spread = sum(weight * (layer - scale) ** 2 for weight, layer in zip(inverse, scales)) / max(1, len(scales) - 1)
    error = math.sqrt(max(1.0, spread) / sum(inverse))
    if abs(abs(scale) - _BETWEEN) <= _ERRORS * error:
        raise _undecided(f"{scale:.2f} ± {error:.2f} of their change lies in the weights")
    return Verdict("fused" if abs(scale) > _BETWEEN else "live", scale, error)


def _guess_decomposed(live: LiveState, changes: Mapping[str, list[Layer]]) -> Verdict:
    """DoRA that was fused leaves rows of exactly its magnitudes."""
    fused = []
    for name, layers in changes.items():
        for layer in layers:
            if isinstance(layer, Decomposed):
                weight = live.base[name]
                norms, magnitudes = wide(weight).flatten(1).norm(dim=1), wide(layer.magnitude).flatten()
                tolerance = 4 * torch.finfo(weight.dtype).eps
                fused.append(bool(((norms / magnitudes - 1).abs() < tolerance).all()))
    share = float(fmean(fused))
    if 0 < share < 1:
        raise _undecided(f"{sum(fused)} of {len(fused)} DoRA layers have rows of their magnitudes")
    return Verdict("fused" if share else "live", share)


def _undecided(seen: str) -> PipelineError:
    return PipelineError(
        f"it was saved with live adapters, or after they had been fused, and the file cannot tell ({seen}); "
        "give --base BASE, which tells, or --reading live or --reading fused, if you know"
    )


def _moves(weight: Tensor, layers: list[Layer]) -> bool:
    change = _total(layers, weight)
    return _dot(change, change) > _rounding(weight, weight)


def _total(layers: list[Layer], base: Tensor) -> Tensor:
    return torch.stack([layer.delta(base) for layer in layers]).sum(0)


def _dot(first: Tensor, second: Tensor) -> float:
    return float((first.double() * second.double()).sum())


def _rounding(first: Tensor, second: Tensor) -> float:
    """The square of what two roundings of such weights may differ by."""
    coarse = max(torch.finfo(tensor.dtype).eps for tensor in (first, second))
    return _dot(wide(first), wide(first)) * coarse**2
