"""How an adapter is spelled in a dialect: all that one layer cannot know, found from names, shapes and scales alone."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter, Layer, LayerName
from texforce_hub.errors import DialectError
from texforce_hub.families.names import part_of
from texforce_hub.formats.codec import peft
from texforce_hub.formats.codec.precision import fit_dtype
from texforce_hub.formats.codec.roles import divisor_of, fill_up, tensors_of
from texforce_hub.formats.dialects import DIALECTS
from texforce_hub.formats.dialects.layout import Dialect
from texforce_hub.formats.peft_config import peft_twin


@dataclass(frozen=True, slots=True)
class Spelling:
    """The rules by which each layer of one adapter is written.

    ``family`` chooses prefixes; ``kinds`` stay as they are, others are expanded; ``alpha`` is the one that lies
    beside every layer, ``None`` where none does; ``ranks`` are those that all layers of a part are filled up to.
    ``dtype`` is of the tensors, their own if ``None``.
    """

    layout: Dialect
    family: str | None
    dtype: torch.dtype | None
    outline: Mapping[LayerName, Layer]
    kinds: frozenset[str]
    ranks: Mapping[str, int] = field(default_factory=dict)
    alpha: float | None = None

    def fit_layer(self, name: LayerName, layer: Layer) -> Layer:
        """The layer as it is written: of a kind and a rank that readers of this layout understand.

        Raises:
            DialectError: it is of another kind, and no exact expansion.
        """
        fitted = self._expand(name, layer)
        rank = self.ranks.get(part_of(name), 1 if self.layout.name == "peft" else 0)  # PEFT makes none of 0
        if isinstance(fitted, Decomposed) and isinstance(fitted.inner, LowRank):
            return replace(fitted, inner=fill_up(fitted.inner, rank))
        return fill_up(fitted, rank) if isinstance(fitted, LowRank) else fitted

    def spell_layer(self, name: LayerName, layer: Layer) -> Iterator[tuple[str, Tensor]]:
        """The tensors that it is stored as, by their names in the file.

        Raises:
            DialectError: as :meth:`fit_layer`, or this layout cannot spell its name.
            AdapterError: values that the dtype cannot hold, too large or too small.
        """
        assert self.layout.write_name is not None
        fitted = self.fit_layer(name, layer)
        if self.layout.name == "peft" and isinstance(fitted, Hadamard | Kronecker):
            fitted = replace(fitted, scale=1.0)  # the config has it, as an alpha
        for role, stored in fit_dtype(list(tensors_of(fitted, self.alpha)), self.dtype, name):
            key = self.layout.write_name(name, role, self.family)
            if key.endswith(".b_norm") and f"{name.removesuffix('.bias')}.weight" not in self.outline:
                key = key.removesuffix(".b_norm") + ".diff_b"  # alone, it is read under this end only
            yield key, stored
            twin = peft_twin(key) if self.layout.name == "peft" else None
            if twin is not None:  # text encoders' tensors are written under both libraries' names
                yield twin, stored.clone()

    def _expand(self, name: LayerName, layer: Layer) -> Layer:
        kind = type(layer).__name__
        inner = layer.inner if isinstance(layer, Decomposed) else None
        if kind in self.kinds and (inner is None or isinstance(inner, LowRank) or "Hadamard" in self.kinds):
            whole = self.layout.name == "peft" and isinstance(layer, Hadamard | Kronecker)
            return peft.fit_product(layer) if whole else layer  # type: ignore[arg-type]  # it is a product
        expanded = layer.low_rank() if isinstance(layer, Hadamard | Kronecker) else None
        if expanded is not None:
            return expanded
        if self.layout.name == "peft" and isinstance(layer, Kronecker):
            raise DialectError(peft.explain_refusal(name, layer, self.outline))
        raise DialectError(
            f"{self.layout.name}: {name} is a {kind} change, which readers of this layout do not know; "
            "write it as 'kohya', or make it low rank first: texforce-hub resize --rank N"
        )


def choose_spelling(adapter: Adapter, dialect: str, family: str | None, dtype: torch.dtype | None) -> Spelling:
    """The spelling of an adapter, from its outline: tensors may be on the ``meta`` device.

    Raises:
        DialectError: no such dialect, one that is only read, or layers that it has no spelling for.
    """
    layout = find_writable(dialect)
    if not adapter.layers:
        raise DialectError(f"{dialect}: the adapter has no layers; a file without any cannot be read again")
    kinds = peft.choose_kinds(adapter.layers) if dialect == "peft" else layout.kinds
    plain = Spelling(layout, family, dtype, adapter.layers, kinds)
    layers = {name: plain.fit_layer(name, layer) for name, layer in adapter.layers.items()}
    return replace(
        plain,
        ranks=_highest_ranks(layers) if layout.one_rank else {},
        alpha=_shared_alpha(layers) if layout.stores_alpha else None,
    )


def find_writable(dialect: str) -> Dialect:
    """The layout of this name.

    Raises:
        DialectError: there is none, or it is only read; the message lists those that are written.
    """
    layout = DIALECTS.get(dialect)
    if layout is None or layout.write_name is None:
        known = ", ".join(name for name, other in DIALECTS.items() if other.write_name is not None)
        raise DialectError(f"no dialect {dialect!r} to write; known: {known}")
    return layout


def _highest_ranks(layers: Mapping[LayerName, Layer]) -> dict[str, int]:
    """Every part's highest rank: its layers are filled up to it with zeros, which change nothing.

    ``diffusers`` 0.30 scales layers of other ranks wrongly where a file stores no alpha.
    """
    highest: dict[str, int] = {}
    for name, layer in layers.items():
        part = part_of(name)
        highest[part] = max(highest.get(part, 0), layer.rank or 0)
    return highest


def _shared_alpha(layers: Mapping[LayerName, Layer]) -> float:
    """One positive alpha for the whole file, the one that leaves most layers as they are.

    Readers take a ``.alpha`` per module, but ``diffusers`` is only exact where all of them agree.
    """
    inner = (layer.inner if isinstance(layer, Decomposed) else layer for layer in layers.values())
    products = [layer for layer in inner if isinstance(layer, LowRank | Hadamard | Kronecker) and layer.scale]
    alphas = Counter(abs(layer.scale) * divisor_of(layer) for layer in products)
    most = max(alphas.values(), default=0)
    often = sorted(alpha for alpha, count in alphas.items() if count == most)
    usual = often[(len(often) - 1) // 2] if often else 1.0  # among equals the one in the middle: one may be absurd
    return float(torch.tensor(usual, dtype=torch.float32)) or 1.0
