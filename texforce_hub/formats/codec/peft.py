"""A PEFT folder: which kind of change it holds, how its layers must be shaped, and its config."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import wide_alike
from texforce_hub.adapter.value import Adapter, Layer, LayerName
from texforce_hub.errors import DialectError
from texforce_hub.families.names import path_of
from texforce_hub.formats.codec.roles import fill_up
from texforce_hub.formats.dialects.layout import PLAIN_AND_DORA
from texforce_hub.formats.peft_config import PRODUCTS, find_factor, lora_config, product_config


def choose_kinds(layers: Mapping[LayerName, Layer]) -> frozenset[str]:
    """The kinds that a folder of these layers keeps; a folder has one, and everything else must become low rank.

    LoHa layers stay where all are; LoKr layers where all are, and PEFT can split their weights as they do.
    """
    kinds = {type(layer).__name__ for layer in layers.values()}
    if len(kinds) > 1 or not kinds <= PRODUCTS.keys() or ("Kronecker" in kinds and _factor(layers) is None):
        return PLAIN_AND_DORA
    return frozenset(kinds)


def explain_refusal(name: LayerName, layer: Layer, layers: Mapping[LayerName, Layer]) -> str:
    """Why a product of this adapter can be neither kept nor expanded."""
    kinds = sorted({type(other).__name__ for other in layers.values()})
    way = "write it as 'kohya', or make it low rank first: texforce-hub resize --rank N"
    if len(kinds) > 1:
        mixed = f"a folder holds one kind of change, this adapter {', '.join(kinds)}"
        return f"peft: {mixed}, and {name}, a {type(layer).__name__}, is not low rank; {way}"
    return f"peft: no decompose_factor splits all weights as this adapter's left factors do, e.g. {name}; {way}"


def fit_product(layer: Hadamard | Kronecker) -> Hadamard | Kronecker:
    """The same change in the shapes that PEFT makes: one rank for both halves, a right side full where it is small."""
    if isinstance(layer, Hadamard):
        rank = max(1, layer.down1.shape[0], layer.down2.shape[0])
        first, second = (
            fill_up(LowRank(down, up), rank) for down, up in ((layer.down1, layer.up1), (layer.down2, layer.up2))
        )
        return Hadamard(first.up, first.down, second.up, second.down, layer.scale)
    if layer.up is None or layer.down is None or 0 < layer.down.shape[0] < _largest(layer) / 2:
        return layer
    up, down = wide_alike(layer.up, layer.down)
    right = (up @ down.flatten(1)).view(layer.up.shape[0], *layer.down.shape[1:])
    return replace(layer, right=right, up=None, down=None)


def describe_folder(layers: Mapping[LayerName, Layer], adapter: Adapter) -> dict[str, Any]:
    """``adapter_config.json`` of these layers, which are as they will be written.

    Raises:
        DialectError: the adapter has several parts, or some of it is DoRA; PEFT's folders hold one of each.
    """
    if len(adapter.parts) > 1:
        raise DialectError(
            f"peft: a folder holds one part, the adapter has {', '.join(adapter.parts)}; "
            "write_adapter makes a folder for each, Adapter.only() chooses one"
        )
    base = adapter.metadata.get("texforce_hub.base")
    inside = {path_of(name): layer for name, layer in layers.items()}
    products = {path: layer for path, layer in inside.items() if isinstance(layer, Hadamard | Kronecker)}
    if products:
        ranks = {path: _rank(layer) for path, layer in products.items()}
        alphas = {path: layer.scale * ranks[path] for path, layer in products.items()}
        kind = type(next(iter(products.values()))).__name__
        factor = _factor(layers) if kind == "Kronecker" else None
        return product_config(kind, ranks, alphas, base=base, factor=factor)
    decomposed = {isinstance(layer, Decomposed) for layer in layers.values()}
    if len(decomposed) > 1:
        raise DialectError("peft: some layers are DoRA and some are not; its config can only say one")
    return lora_config(
        {path: layer.rank or 1 for path, layer in inside.items()}, base=base, decomposed=decomposed.pop()
    )


def _factor(layers: Mapping[LayerName, Layer]) -> int | None:
    products = [layer for layer in layers.values() if isinstance(layer, Kronecker)]
    return find_factor((size, left) for layer in products for size, left in zip(layer.shape[:2], layer.left.shape))


def _largest(layer: Kronecker) -> int:
    return max(layer.shape[0] // layer.left.shape[0], layer.shape[1] // layer.left.shape[1])


def _rank(layer: Hadamard | Kronecker) -> int:
    """The ``r`` of PEFT's config; beside a full right side, the smallest at which PEFT makes it full."""
    if isinstance(layer, Hadamard):
        return layer.down1.shape[0]
    return -(-_largest(layer) // 2) if layer.down is None else layer.down.shape[0]
