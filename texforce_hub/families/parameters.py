"""The shape of a parameter, and the few ways layers come in pairs of weight and bias."""

from collections.abc import Mapping

Shape = tuple[int, ...]
Weights = dict[str, Shape]


def linear(name: str, out: int, inner: int, *, bias: bool = True) -> Weights:
    """A linear layer's parameters."""
    return {f"{name}.weight": (out, inner)} | ({f"{name}.bias": (out,)} if bias else {})


def convolution(name: str, out: int, inner: int, kernel: int) -> Weights:
    """A square convolution's parameters."""
    return {f"{name}.weight": (out, inner, kernel, kernel), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Weights:
    """A norm's parameters, both one-dimensional."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def under(prefix: str, weights: Mapping[str, Shape]) -> Weights:
    """The same parameters, one module deeper."""
    return {f"{prefix}.{name}": shape for name, shape in weights.items()}
