"""Methods that are linear combinations of the changes: exact in the factors, whatever chose the coefficients."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from texforce_hub.adapter.algebra import concat, gram
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.errors import MergeError
from texforce_hub.merge.methods.registry import Coefficients, Context, Law, Mergeable, Terms, merge_method


def combine(layers: Sequence[Mergeable], coefficients: Sequence[float]) -> Mergeable:
    """``Σ cᵢ Δᵢ``, exactly: low rank if all are, else dense (or a vector)."""
    factors = [layer for layer in layers if isinstance(layer, LowRank)]
    if len(factors) == len(layers):
        return concat(factors, coefficients)
    total = sum((c * layer.delta() for c, layer in zip(coefficients, layers)), torch.zeros(()))
    return Vector(total) if isinstance(layers[0], Vector) else Dense(total)


def products(layers: Sequence[Mergeable]) -> Tensor:
    """All inner products of the changes, float64 ``(n, n)``, from the factors where there are factors."""
    factors = [layer for layer in layers if isinstance(layer, LowRank)]
    if len(factors) == len(layers):
        return gram(factors)
    flat = torch.stack([layer.delta().double().flatten() for layer in layers])
    return flat @ flat.T


def linear_method(*, laws: set[Law], most: int | None = None) -> Callable[[Coefficients], Coefficients]:
    """Register a method that is a linear combination, by its coefficients alone.

    The formula is ``f(terms, **options) -> coefficients (n)``. So many layers can be combined together, and no change
    is ever formed.
    """

    def register(formula: Coefficients) -> Coefficients:
        @functools.wraps(formula)
        def combined(
            layers: Sequence[Mergeable], weights: Sequence[float], *, context: Context | None = None, **options: Any
        ) -> Mergeable:
            positions = (context or Context()).positions or range(len(layers))
            return combine(layers, formula(Terms(products(layers).cpu(), weights, positions), **options))

        merge_method(laws=laws, most=most, coefficients=formula)(combined)
        return formula

    return register


@linear_method(laws={"identity", "gauge", "scale", "order", "negation"})
def cat(terms: Terms) -> Sequence[float]:
    """The exact sum Σ wᵢ Δᵢ; its rank is the sum of the ranks.

    Task arithmetic (arXiv 2212.04089) in low-rank form: what attaching all sources at once does.
    """
    return terms.weights


@linear_method(laws={"identity", "gauge", "scale", "order", "negation"})
def svd(terms: Terms) -> Sequence[float]:
    """The exact sum Σ wᵢ Δᵢ at a chosen rank, with the share it keeps (the default).

    The nearest change of that rank (Eckart–Young), found from the factors. Without a rank or an energy, the
    rank is the largest among the sources that have the layer.
    """
    return terms.weights


@linear_method(laws={"identity", "gauge", "scale"})
def subtract(terms: Terms) -> Sequence[float]:
    """The first source minus the others: w₁ Δ₁ − Σ wᵢ Δᵢ, exactly.

    Takes an adapter back out of a sum; the first source is special, so order matters.
    """
    return [w if position == 0 else -w for position, w in zip(terms.positions, terms.weights)]


@linear_method(laws={"identity", "gauge", "scale", "order"}, most=2)
def slerp(terms: Terms, *, length: Literal["interpolated", "chord"] = "interpolated") -> Sequence[float]:
    """Spherical interpolation between two sources, layer by layer, exactly (Shoemake 1985).

    With W = w₁ + w₂, t = w₂ / W and the angle θ between Δ₁ and Δ₂, the direction is
    sin((1−t)θ)/sin θ · Δ₁/‖Δ₁‖ + sin(tθ)/sin θ · Δ₂/‖Δ₂‖. Parallel changes are interpolated linearly.

    Args:
        length: interpolated: the direction times W ((1−t) ‖Δ₁‖ + t ‖Δ₂‖); chord: the same coefficients on Δ₁
            and Δ₂ unnormalised, times W (mergekit).

    Raises:
        MergeError: a negative weight: there is no arc in that direction.
    """
    weights = terms.weights
    if min(weights) < 0:
        raise MergeError(f"slerp with weights {list(weights)}; expected none below 0: it moves along the arc between")
    total = sum(weights)
    if len(weights) == 1 or total == 0:
        return weights
    (aa, ab), (_, bb) = terms.products.tolist()
    first, second = math.sqrt(max(aa, 0.0)), math.sqrt(max(bb, 0.0))
    share = weights[1] / total
    cosine = ab / (first * second) if first * second > 0 else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-6:
        return weights
    arc = [math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)]
    if length == "interpolated":
        mean = (1 - share) * first + share * second
        arc = [arc[0] * mean / first, arc[1] * mean / second]
    return [total * a for a in arc]


@linear_method(laws={"identity", "gauge", "scale", "order", "negation"})
def model_stock(terms: Terms) -> Sequence[float]:
    """The weighted sum, drawn towards the base by how much its sources disagree (arXiv 2403.19522).

    With n sources and the mean cosine c of their signed changes (at least 0), the sum Σ wᵢ Δᵢ is multiplied
    by n c / (1 + (n − 1) c): 1 for equal changes, 0 for unrelated ones. Weights of 1/n give the paper's case.
    """
    products, weights = terms.products, terms.weights
    count = len(weights)
    if count == 1:
        return weights
    signs = torch.tensor([math.copysign(1.0, w) for w in weights], dtype=torch.float64)
    norms = products.diagonal().clamp_min(0).sqrt()
    cosines = products * torch.outer(signs, signs) / torch.outer(norms, norms).clamp_min(torch.finfo(norms.dtype).tiny)
    pairs = torch.triu_indices(count, count, offset=1)
    mean = min(1.0, max(0.0, float(cosines[pairs[0], pairs[1]].mean())))
    shrink = count * mean / (1 + (count - 1) * mean)
    return [shrink * w for w in weights]
