"""How alike two adapters are, layer by layer, computed from their factors."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Vector
from texforce_hub.adapter.lazy import LazyAdapter
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import wide_alike
from texforce_hub.adapter.value import Adapter, Layer, LayerName
from texforce_hub.apply.model import Base, find_weight
from texforce_hub.errors import MergeError
from texforce_hub.families.order import natural
from texforce_hub.formats.codec.renaming import share_names
from texforce_hub.hub.read import open_adapter
from texforce_hub.hub.stack import Source, read_stack
from texforce_hub.merge.methods.linear import products
from texforce_hub.merge.methods.registry import Mergeable
from texforce_hub.merge.methods.resolve import resolve
from texforce_hub.merge.methods.spaces import matrices
from texforce_hub.merge.methods.spectral import singular_triplets
from texforce_hub.merge.overflow import naming_overflow


@dataclass(frozen=True, slots=True)
class ComparedLayer:
    """One layer that both adapters change.

    norms: of the two changes
    cosine: between them as vectors, in [−1, 1]
    angles: principal angles between what they read (right singular spaces) and what they write (left ones), the
        smallest of each, in degrees; 90: they do not touch
    overlap: share of the second's output space inside the first's, in [0, 1]
    interference: share of the norm that summing both loses (above 0) or gains (below 0) against orthogonal
        changes: ``1 − ‖a + b‖ / √(‖a‖² + ‖b‖²)``
    """

    name: LayerName
    norms: tuple[float, float]
    cosine: float
    angles: tuple[float, float]
    overlap: float
    interference: float


@dataclass(frozen=True, slots=True, repr=False)
class Comparison:
    """Two adapters side by side.

    missing: layers that only the first, and only the second, has
    """

    layers: tuple[ComparedLayer, ...]
    missing: tuple[tuple[LayerName, ...], tuple[LayerName, ...]]
    cosine: float
    interference: float

    def __repr__(self) -> str:
        alone = f"{len(self.missing[0])} and {len(self.missing[1])} in one only"
        figures = f"cosine {self.cosine:+.3f}, interference {self.interference:+.3f}"
        return f"Comparison({len(self.layers)} layers in both, {alone}; {figures})"

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain data, ready for JSON."""
        return asdict(self)


def compare_adapters(
    a: Source | LazyAdapter,
    b: Source | LazyAdapter,
    *,
    base: Base | None = None,
    device: str | torch.device | None = None,
) -> Comparison:
    """Cosine, principal angles and interference of every layer that both adapters change, one layer at a time.

    Args:
        a, b: each an adapter, or a reference or path, which is read layer by layer and may bring a weight
            (``"A:0.7"``).
        base: pipeline, model or mapping of weights; only DoRA layers need it.
        device: where the layers of references and paths are read to; the CPU by default.

    Raises:
        ConfigError: something else than an adapter, a reference or a path.
        RefError, FileError: a reference that names no adapter here.
        MergeError: no layer in common, layers of different shapes, or a DoRA layer without ``base``.
        DialectError: one names a transformer's layers as the authors' code does, and they cannot be divided.

    Example:
        >>> from texforce_hub import compare_adapters, read_adapter
        >>> colour = read_adapter("shapes-colour")
        >>> round(compare_adapters(colour, colour.scaled(0.5)).cosine, 3)
        1.0
    """
    a, b = share_names([_opened(adapter, device) for adapter in (a, b)])
    shared = sorted((name for name in a.layers if name in b.layers), key=natural)
    if not shared:
        raise MergeError(f"no layer in common: one has {next(iter(a.layers), None)!r}, the other {_first(b)!r}")
    layers = tuple(_compare_named(name, a.layers[name], b.layers[name], base) for name in shared)
    inner = math.fsum(layer.cosine * layer.norms[0] * layer.norms[1] for layer in layers)
    squares = [math.fsum(layer.norms[side] ** 2 for layer in layers) for side in (0, 1)]
    only = tuple(
        tuple(sorted(mine.layers.keys() - other.layers.keys(), key=natural)) for mine, other in ((a, b), (b, a))
    )
    return Comparison(layers, (only[0], only[1]), _cosine(inner, *squares), _interference(inner, *squares))


def _opened(source: Source | LazyAdapter, device: str | torch.device | None) -> Adapter | LazyAdapter:
    if isinstance(source, Adapter | LazyAdapter):
        return source
    (entry,) = read_stack(source, read=lambda ref: open_adapter(ref, device=device))
    assert isinstance(entry.content, LazyAdapter)  # as it was opened
    return entry.content.weighted(entry.weight.weight_of)


def _missing_in(other: Adapter | LazyAdapter, mine: Adapter | LazyAdapter) -> tuple[LayerName, ...]:
    return tuple(sorted(mine.layers.keys() - other.layers.keys(), key=natural))


def _first(adapter: Adapter | LazyAdapter) -> LayerName | None:
    return next(iter(adapter.layers), None)


def _compare_named(name: LayerName, a: Layer, b: Layer, base: Base | None) -> ComparedLayer:
    with naming_overflow(name):
        return _compare_layer(name, a, b, base)


def _compare_layer(name: LayerName, a: Layer, b: Layer, base: Base | None) -> ComparedLayer:
    if a.shape != b.shape:
        raise MergeError(f"{name}: shapes {a.shape} and {b.shape}; expected one family")
    pair = [_resolved(name, layer, base) for layer in (a, b)]
    (aa, ab), (_, bb) = products(pair).tolist()
    reads, writes, overlap = (90.0, 90.0, 0.0) if isinstance(pair[0], Vector) or not aa * bb > 0 else _spaces(pair)
    return ComparedLayer(
        name,
        (math.sqrt(max(0.0, aa)), math.sqrt(max(0.0, bb))),
        _cosine(ab, aa, bb),
        (reads, writes),
        overlap,
        _interference(ab, aa, bb),
    )


def _resolved(name: LayerName, layer: Layer, base: Base | None) -> Mergeable:
    return resolve(name, layer, find_weight(base, name, layer.shape) if isinstance(layer, Decomposed) else None)


def _cosine(inner: float, first: float, second: float) -> float:
    return max(-1.0, min(1.0, inner / math.sqrt(first * second))) if first * second > 0 else 0.0


def _interference(inner: float, first: float, second: float) -> float:
    apart = first + second
    return 1 - math.sqrt(max(0.0, apart + 2 * inner) / apart) if apart > 0 else 0.0


def _spaces(pair: list[Mergeable]) -> tuple[float, float, float]:
    """Smallest principal angle of the right and the left singular spaces, and the left spaces' overlap."""
    factors = [_of_size_one(layer) for layer in matrices(pair)]
    (left_a, _, right_a), (left_b, _, right_b) = (singular_triplets(layer) for layer in factors)
    written = torch.linalg.svdvals(left_a.double().mT @ left_b.double())
    read = torch.linalg.svdvals(right_a.double() @ right_b.double().mT)
    overlap = float(written.square().sum()) / min(left_a.shape[1], left_b.shape[1])
    return _degrees(read[0]), _degrees(written[0]), min(1.0, overlap)


def _of_size_one(layer: LowRank) -> LowRank:
    """The same singular spaces, of numbers whose squares neither overflow nor vanish."""
    down, up = wide_alike(layer.down, layer.up)
    return LowRank(down / down.abs().max(), up / up.abs().max())


def _degrees(cosine: Tensor) -> float:
    return math.degrees(math.acos(max(-1.0, min(1.0, float(cosine)))))
