"""Plan + tensors → adapter."""

import math
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.lazy import LazyAdapter
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import wide, wide_alike
from texforce_hub.adapter.value import Adapter, Layer
from texforce_hub.errors import AdapterError, DialectError
from texforce_hub.files.lazy_mapping import LazyMapping
from texforce_hub.formats.plan.layers import LayerPlan
from texforce_hub.formats.plan.planning import Plan


def decode(plan: Plan, tensors: Mapping[str, Tensor], *, alpha: float | None = None) -> Adapter:
    """The adapter that a file's plan and tensors make; ``alpha`` counts where the file stores none.

    Raises:
        DialectError: the plan has faults, a tensor is missing, or one layer is there twice with unequal values.
        AdapterError: tensors of a dtype that is no floating one, or an ``alpha`` that is not finite.
    """
    check_plan(plan, tensors)
    layers = {name: decode_layer(layer, tensors, alpha) for name, layer in plan.layers.items()}
    return Adapter(layers, describe_reading(plan, alpha), {key: tensors[key] for key in plan.extras})


def check_plan(plan: Plan, tensors: Collection[str]) -> Plan:
    """The plan, if it can be carried out with the tensors of these names.

    Raises:
        DialectError: it has faults, or a tensor is missing.
    """
    if plan.faults:
        more = f" (and {len(plan.faults) - 1} more)" if len(plan.faults) > 1 else ""
        raise DialectError(f"{_named(plan.dialects)}: {plan.faults[0]}{more}; the file is incomplete or damaged")
    missing = [key for layer in plan.layers.values() for key in layer.keys.values() if key not in tensors]
    if missing:
        raise DialectError(f"{_named(plan.dialects)}: tensor {missing[0]!r} is in the header and not in the file")
    return plan


def _named(dialects: tuple[str, ...]) -> str:
    return " + ".join(dialects)


def decode_layer(layer: LayerPlan, tensors: Mapping[str, Tensor], alpha: float | None = None) -> Layer:
    """One layer of a plan without faults.

    Raises:
        DialectError: it is there twice with unequal values.
        AdapterError: tensors of a dtype that is no floating one.
    """
    decoded = _decode_one(layer, tensors, alpha)
    for twin in layer.twins:
        other = _decode_one(twin, tensors, alpha)
        if not equal_layers(decoded, other):
            raise DialectError(
                f"{_named((layer.dialect, twin.dialect))}: {layer.name} is there twice, with unequal values; "
                "split the file, or remove one of the two spellings"
            )
    return decoded


def equal_layers(one: Layer, other: Layer) -> bool:
    """The same kind, tensors and scales, bit for bit."""

    def facts(layer: Layer) -> list[Any]:
        values = [getattr(layer, field.name) for field in fields(layer)]
        inner = [fact for value in values for fact in (facts(value) if isinstance(value, Layer) else [value])]
        return [type(layer), *inner]

    first, second = facts(one), facts(other)
    return len(first) == len(second) and all(
        torch.equal(wide(a), wide(b)) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(first, second, strict=True)
    )


def _decode_one(plan: LayerPlan, tensors: Mapping[str, Tensor], alpha: float | None) -> Layer:
    if alpha is not None and not _is_finite(alpha):
        raise AdapterError(f"alpha {alpha!r:.80}; expected a finite number")
    parts = {role: tensors[key] for role, key in plan.keys.items()}
    scale = alpha / plan.divisor if alpha is not None and plan.alpha is None and plan.divisor else plan.scale
    match plan.kind:
        case "LowRank":
            layer: Layer = _decode_low_rank(parts, plan, scale)
        case "Hadamard":
            layer = _decode_hadamard(parts, plan, scale)
        case "Kronecker":
            layer = _decode_kronecker(parts, plan, scale)
        case "Vector":
            return Vector(parts["diff"], scale)
        case _:
            return Dense(parts["diff"].view(plan.shape), scale)
    if plan.decomposed is None:
        return layer
    assert isinstance(layer, LowRank | Hadamard | Kronecker)
    return Decomposed(layer, parts["magnitude" if "magnitude" in parts else "dora"], plan.decomposed)


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float) and math.isfinite(number)


def _decode_low_rank(parts: Mapping[str, Tensor], plan: LayerPlan, scale: float) -> LowRank:
    down, up = parts["down"], parts["up"].flatten(1)
    if "mid" in parts:  # Tucker: the middle kernel goes into down, exactly
        mid, inner = wide_alike(parts["mid"], down)
        down = torch.einsum("ij...,jk->ik...", mid, inner.flatten(1))
    return LowRank(down.view(down.shape[0], *plan.shape[1:]), up, scale)


def _decode_hadamard(parts: Mapping[str, Tensor], plan: LayerPlan, scale: float) -> Hadamard:
    up1, down1 = _decode_product(parts, "hada_w1_a", "hada_w1_b", "hada_t1")
    up2, down2 = _decode_product(parts, "hada_w2_a", "hada_w2_b", "hada_t2")
    inner = plan.shape[1:]
    return Hadamard(up1, down1.view(-1, *inner), up2, down2.view(-1, *inner), scale)


def _decode_product(parts: Mapping[str, Tensor], up: str, down: str, core: str) -> tuple[Tensor, Tensor]:
    """``(up, down)``; with Tucker's core LyCORIS stores up turned, and the core goes into down."""
    if core not in parts:
        return parts[up], parts[down]
    middle, inner = wide_alike(parts[core], parts[down])
    return parts[up].T, torch.einsum("ij...,jk->ik...", middle, inner)


def _decode_kronecker(parts: Mapping[str, Tensor], plan: LayerPlan, scale: float) -> Kronecker:
    left = parts["lokr_w1"] if "lokr_w1" in parts else torch.mm(*wide_alike(parts["lokr_w1_a"], parts["lokr_w1_b"]))
    kernel = plan.shape[2:]
    inner = plan.shape[1] // left.shape[1]
    if "lokr_w2" in parts:
        right = parts["lokr_w2"]
        return Kronecker(left, right=right.view(right.shape[0], inner, *kernel), scale=scale)
    up, down = _decode_product(parts, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    return Kronecker(left, up=up, down=down.view(down.shape[0], inner, *kernel), scale=scale)


def describe_reading(plan: Plan, alpha: float | None) -> dict[str, str]:
    """The file's own words, and what reading it established: dialects, family, the alphas as they were found."""
    metadata = dict(plan.metadata)
    metadata["texforce_hub.dialect"] = _named(plan.dialects)
    if plan.family.family is not None:
        metadata["texforce_hub.family"] = plan.family.family
    else:
        metadata.pop("texforce_hub.family", None)
    alphas = {alpha if layer.alpha is None else layer.alpha for layer in plan.layers.values()} - {None}
    if alphas:
        metadata["texforce_hub.alpha"] = ", ".join(sorted(f"{value:g}" for value in alphas))
    if plan.base is not None:
        metadata.setdefault("texforce_hub.base", plan.base)
    return metadata


def decode_lazily(
    plan: Plan, outlines: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, alpha: float | None = None
) -> LazyAdapter:
    """As :func:`decode`, of tensors that are read when they are asked for; ``outlines`` are their shapes.

    Raises:
        DialectError, AdapterError: as :func:`decode`; what only the numbers tell, when they are read.
    """
    once = {name: replace(layer, twins=()) for name, layer in plan.layers.items()}  # shapes have no values to compare
    outline = decode(replace(plan, layers=once), outlines, alpha=alpha)
    layers = LazyMapping(plan.layers, lambda name: decode_layer(plan.layers[name], tensors, alpha))
    return LazyAdapter(outline, layers, LazyMapping(plan.extras, tensors.__getitem__))
