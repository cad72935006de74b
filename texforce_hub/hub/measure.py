"""What the numbers of an adapter are like, layer by layer: size, effective rank, NaN, zeros."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from texforce_hub.adapter.algebra import singular_values
from texforce_hub.adapter.batches import take_batches
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import wide
from texforce_hub.adapter.value import Layer, LayerName
from texforce_hub.errors import AdapterError
from texforce_hub.families.order import natural
from texforce_hub.hub.bundles import Bundle, bundle_file
from texforce_hub.hub.inspect import Inspection, with_error
from texforce_hub.hub.read import open_adapter

_LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # it is there
_MOST_NUMBERS = 2**27  # that a change is expanded to: half a gigabyte, beyond the largest layers in use


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer's numbers.

    ``norm`` is the Frobenius norm of its change, of the part before the magnitudes for DoRA.
    ``effective_rank`` is the exponential of the entropy of its normed singular values (Roy & Vetterli, 2007),
    between 1 and the rank. Both are ``None`` where ``broken`` numbers (NaN, infinity) make them meaningless.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    norm: float | None
    effective_rank: float | None
    broken: int

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing."""
        return self.norm == 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"is_zero": self.is_zero}


def measure_file(source: str | Path | Bundle, *, device: str | torch.device | None = None) -> list[LayerFacts]:
    """The numbers of every layer of a file, or of an adapter in several; NaN and infinity are counted, not refused.

    Memory: a few layers at a time, whatever the file's size.

    Raises:
        FileError, DialectError, AdapterError: the file cannot be read as an adapter.
    """
    bundle = source if isinstance(source, Bundle) else bundle_file(Path(source))
    measured = measure_layers(open_adapter(bundle, device=device, checked=False).layers.items())
    return sorted(measured, key=lambda layer: natural(layer.name))


def measure_layers(layers: Iterable[tuple[LayerName, Layer]]) -> Iterator[LayerFacts]:
    """The numbers of every layer, in their order; no more than a few are held at once."""
    for together in take_batches(layers):
        yield from _measure(together)


def with_numbers(known: Inspection, measured: Sequence[LayerFacts]) -> Inspection:
    """What is known of an adapter and its numbers: NaN, infinity and zeros are problems, the first two an error."""
    broken, zero = sum(bool(layer.broken) for layer in measured), sum(layer.is_zero for layer in measured)
    counted = ((broken, "hold NaN or infinity"), (zero, "are zero"))
    lines = [f"{count} of {len(measured)} layers {what}" for count, what in counted if count]
    judged = replace(known, problems=(*known.problems, *lines))
    return with_error(judged, lines[0]) if broken else judged


def _measure(layers: Mapping[LayerName, Layer]) -> list[LayerFacts]:
    broken = {name: _count_broken(layer) for name, layer in layers.items()}
    whole = {name: layer for name, layer in layers.items() if not broken[name]}
    values = _measured(whole)
    return [
        LayerFacts(
            name,
            type(layer).__name__,
            layer.shape,
            layer.rank,
            _norm(values[name]) if name in values else None,
            _effective_rank(values[name]) if name in values else None,
            broken[name],
        )
        for name, layer in layers.items()
    ]


def _count_broken(layer: Layer) -> int:
    return sum(int((~torch.isfinite(tensor.float())).sum()) for tensor in layer.tensors())


def _measured(layers: Mapping[LayerName, Layer]) -> Mapping[LayerName, Tensor]:
    """The spectra of layers; where numbers overflow on the way, each alone and in float64.

    Raises:
        AdapterError: one is too large for that.
    """
    with suppress(_LinAlgError):
        values = _spectra(layers)
        if all(map(_is_finite, values.values())):
            return values
    return {name: _in_double(name, layer) for name, layer in layers.items()}


def _in_double(name: LayerName, layer: Layer) -> Tensor:
    bare = layer.inner if isinstance(layer, Decomposed) else layer
    if math.prod(bare.shape) <= _MOST_NUMBERS:
        with suppress(_LinAlgError):
            values = _dense_values(bare.map(torch.Tensor.double).delta())
            if _is_finite(values):
                return values
    raise AdapterError(f"{name}: its numbers are so large that its change overflows float64; it cannot be measured")


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all()) and math.isfinite(_norm(values))


def _norm(values: Tensor) -> float:
    """Their Frobenius norm, whose squares alone could overflow."""
    largest = float(values.max()) if values.numel() else 0.0
    return largest * float((values.double() / largest).norm()) if largest else 0.0


def _spectra(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Singular values of every layer's change; low-rank ones together, by their factors."""
    bare = {name: layer.inner if isinstance(layer, Decomposed) else layer for name, layer in layers.items()}
    factored = {name: pair for name, layer in bare.items() if (pair := _factored(layer)) is not None}
    spectra = dict(zip(factored, singular_values(list(factored.values())), strict=True)) if factored else {}
    return spectra | {name: _values_of_one(name, layer) for name, layer in bare.items() if name not in factored}


def _factored(layer: Layer) -> LowRank | None:
    if isinstance(layer, Hadamard) and layer.rank < min(layer.shape[0], math.prod(layer.shape[1:])):
        return layer.low_rank()
    return layer if isinstance(layer, LowRank) else None


def _values_of_one(name: LayerName, layer: Layer) -> Tensor:
    if isinstance(layer, Kronecker):
        return _kronecker_values(layer)
    if math.prod(layer.shape) > _MOST_NUMBERS:
        raise AdapterError(f"{name}: a change of {layer.shape}, too large to measure without its factors")
    return _dense_values(layer.delta())


def _kronecker_values(layer: Kronecker) -> Tensor:
    """All products of a left and a right singular value: never more numbers than the factors have."""
    if layer.right is not None:
        right = _dense_values(wide(layer.right))
    else:
        assert layer.up is not None
        assert layer.down is not None
        (right,) = singular_values([LowRank(layer.down, layer.up)])
    values = torch.outer(_dense_values(wide(layer.left)).double(), right.double()) * abs(layer.scale)
    return values.flatten().sort(descending=True).values


def _dense_values(change: Tensor) -> Tensor:
    values: Tensor = torch.linalg.svdvals(change.flatten(1) if change.dim() > 1 else change[None])
    return values


def _effective_rank(values: Tensor) -> float:
    total = float(values.sum())
    if total == 0:
        return 0.0
    shares = values.double() / total
    shares = shares[shares > 0]
    return math.exp(-float((shares * shares.log()).sum()))
