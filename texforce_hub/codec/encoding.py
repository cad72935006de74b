"""Adapter + dialect → tensors, metadata, config."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from texforce_hub import __version__
from texforce_hub.adapter import Adapter, Decomposed, Dense, Hadamard, Kronecker, Layer, LowRank, Vector, wide
from texforce_hub.dialects import DIALECTS, Dialect
from texforce_hub.dialects.headers import describe_training, keep_metadata, peft_config, peft_twin
from texforce_hub.errors import AdapterError, DialectError

logger = logging.getLogger("texforce_hub")


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a file will hold: tensors by the dialect's names, header metadata, PEFT's config if it has one.

    ``left_out`` names extras that this layout's readers would stumble over.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None
    filename: str
    left_out: tuple[str, ...] = field(default=())


def encode(adapter: Adapter, dialect: str, *, dtype: torch.dtype | None = None) -> Encoded:
    """An adapter in a dialect's names; tensors keep their dtype unless one is given.

    Raises:
        DialectError: no such dialect, one that is only read, or a layer that it has no spelling for.
        AdapterError: a value that the dtype cannot hold.
    """
    layout = _writable(dialect)
    if not adapter.layers:
        raise DialectError(f"{dialect}: the adapter has no layers; a file without any cannot be read again")
    layers = {name: _fitting(name, layer, layout) for name, layer in adapter.layers.items()}
    layers = _level_ranks(layers) if layout.one_rank else layers
    verdict = adapter.family_verdict
    spelling = verdict.family or (None if "text_encoder_2" in adapter.parts else "sd1")
    tensors = _encode_layers(layers, layout, spelling, dtype)
    metadata = keep_metadata(adapter.metadata) | _provenance(verdict.family)
    config = None
    if dialect == "peft":
        config = _peft_folder(layers, adapter, tensors)
    if layout.stores_alpha:
        metadata |= describe_training(_ranks(layers), _kinds(layers), verdict.family)
    extras = dict(adapter.extras) if layout.carries_extras else {}
    left_out = tuple(name for name in adapter.extras if name not in extras)
    if left_out:
        logger.warning("%s: %d extra tensors have no place in this layout: %s", dialect, len(left_out), left_out)
    return Encoded(tensors | extras, metadata, config, layout.filename, left_out)


def _writable(dialect: str) -> Dialect:
    layout = DIALECTS.get(dialect)
    if layout is None or layout.write_name is None:
        known = ", ".join(name for name, other in DIALECTS.items() if other.write_name is not None)
        raise DialectError(f"no dialect {dialect!r} to write; known: {known}")
    return layout


def _fitting(name: str, layer: Layer, layout: Dialect) -> Layer:
    """The layer as a kind that this layout's readers understand: products expand exactly, or cannot be written."""
    if type(layer).__name__ in layout.kinds:
        inner = layer.inner if isinstance(layer, Decomposed) else None
        if inner is None or isinstance(inner, LowRank) or "Hadamard" in layout.kinds:
            return layer
    elif isinstance(layer, Hadamard | Kronecker):
        expanded = layer.low_rank()
        if expanded is not None:
            return expanded
    raise DialectError(
        f"{layout.name}: {name} is a {type(layer).__name__} change, which readers of this layout do not know; "
        "write it as 'kohya', or extract a low-rank approximation first"
    )


def _level_ranks(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Every part's layers at its highest rank, filled up with zeros, which change nothing.

    ``diffusers`` 0.30 scales layers of other ranks wrongly where a file stores no alpha.
    """
    highest: dict[str, int] = {}
    for name, layer in layers.items():
        part = name.partition(".")[0]
        highest[part] = max(highest.get(part, 0), layer.rank or 0)
    return {name: _fill_up(layer, highest[name.partition(".")[0]]) for name, layer in layers.items()}


def _fill_up(layer: Layer, rank: int) -> Layer:
    if isinstance(layer, Decomposed) and isinstance(layer.inner, LowRank):
        return replace(layer, inner=_fill_up_pair(layer.inner, rank))
    return _fill_up_pair(layer, rank) if isinstance(layer, LowRank) else layer


def _fill_up_pair(layer: LowRank, rank: int) -> LowRank:
    more = rank - layer.rank
    if not more:
        return layer
    down = torch.cat([layer.down, layer.down.new_zeros(more, *layer.down.shape[1:])])
    return replace(layer, down=down, up=torch.cat([layer.up, layer.up.new_zeros(layer.up.shape[0], more)], dim=1))


def _encode_layers(
    layers: Mapping[str, Layer], layout: Dialect, family: str | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    assert layout.write_name is not None
    alpha = _shared_alpha(layers) if layout.stores_alpha else None
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for role, tensor, factor in _halves(layer, alpha):
            key = layout.write_name(name, role, family)
            if key in tensors:
                raise DialectError(f"{layout.name}: two layers would be written as {key!r}, one of them {name}")
            stored_as = tensor.dtype if role == "alpha" or dtype is None else dtype
            tensors[key] = _store(tensor, factor, stored_as, name)
    return tensors


def _shared_alpha(layers: Mapping[str, Layer]) -> float:
    """One positive alpha for the whole file, the one that leaves most layers as they are.

    Readers take a ``.alpha`` per module, but ``diffusers`` is only exact where all of them agree.
    """
    inner = (layer.inner if isinstance(layer, Decomposed) else layer for layer in layers.values())
    products = [layer for layer in inner if isinstance(layer, LowRank | Hadamard | Kronecker) and layer.scale]
    alphas = Counter(abs(layer.scale) * _divisor(layer) for layer in products)
    usual = alphas.most_common(1)[0][0] if alphas else 1.0
    return float(torch.tensor(usual, dtype=torch.float32)) or 1.0


def _store(tensor: Tensor, factor: float, dtype: torch.dtype, name: str) -> Tensor:
    """``factor · tensor``, contiguous, rounded once.

    Raises:
        AdapterError: a finite value became infinite.
    """
    product = tensor.detach() if factor == 1.0 else factor * wide(tensor.detach())
    stored = product.to(dtype).contiguous()
    if not torch.equal(torch.isfinite(wide(stored)), torch.isfinite(wide(tensor))):
        raise AdapterError(f"{name}: values up to {wide(product).abs().max():.3g} do not fit {dtype}; widen it")
    return stored


Halves = Iterator[tuple[str, Tensor, float]]
"""Role, tensor, and the factor that goes into it."""


def _halves(layer: Layer, alpha: float | None) -> Halves:
    """Everything that a layer is stored as, beside this ``alpha`` if there is one.

    What alpha does not say of the scale goes into one tensor, its sign always: a negative or zero ``.alpha``
    misleads other readers.
    """
    match layer:
        case Decomposed(inner=inner, magnitude=magnitude, axis=axis, weight=weight):
            if weight != 1.0:
                raise DialectError(f"a DoRA layer at weight {weight:g} has no spelling; write it at weight 1")
            yield from _halves(inner, alpha)
            yield _magnitude(magnitude, axis, inner.shape, stores_alpha=alpha is not None)
        case Dense(value=value, scale=scale) | Vector(value=value, scale=scale):
            yield "diff", value, scale
        case LowRank() | Hadamard() | Kronecker():
            fixed = isinstance(layer, Kronecker) and layer.right is not None  # such a layer's alpha says nothing
            said = 1.0 if fixed or alpha is None else alpha / _divisor(layer)
            factor = layer.scale / said
            if math.isclose(abs(factor), 1.0, rel_tol=2**-23):  # all that a float32 alpha can miss
                factor = math.copysign(1.0, factor)
            yield from _product(layer, factor)
            if alpha is not None:
                yield "alpha", torch.tensor(alpha, dtype=torch.float32), 1.0


def _product(layer: LowRank | Hadamard | Kronecker, factor: float) -> Halves:
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


def _divisor(layer: LowRank | Hadamard | Kronecker) -> int:
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


def _ranks(layers: Mapping[str, Layer]) -> list[int]:
    return [layer.rank for layer in layers.values() if layer.rank is not None]


def _kinds(layers: Mapping[str, Layer]) -> frozenset[str]:
    return frozenset(type(layer).__name__ for layer in layers.values())


def _provenance(family: str | None) -> dict[str, str]:
    return {"format": "pt", "texforce_hub.version": __version__} | ({"texforce_hub.family": family} if family else {})


def _peft_folder(layers: Mapping[str, Layer], adapter: Adapter, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The config of a PEFT folder; text encoders' tensors are written under both libraries' names.

    Raises:
        DialectError: the adapter has several parts; PEFT's folders hold one.
    """
    if len(adapter.parts) > 1:
        raise DialectError(
            f"peft: a folder holds one part, the adapter has {', '.join(adapter.parts)}; choose one: only()"
        )
    for key in list(tensors):
        twin = peft_twin(key)
        if twin is not None:
            tensors[twin] = tensors[key].clone()
    ranks = {name.partition(".")[2]: layer.rank or 1 for name, layer in layers.items()}
    decomposed = {isinstance(layer, Decomposed) for layer in layers.values()}
    if len(decomposed) > 1:
        raise DialectError("peft: some layers are DoRA and some are not; its config can only say one")
    return peft_config(ranks, base=adapter.metadata.get("texforce_hub.base"), decomposed=decomposed.pop())
