"""A stack whose weights have a gradient: each layer's change is added times a scalar that autograd follows.

As :mod:`texforce_hub.apply.per_sample`, by forward hooks beside the layers; no weight of the model is touched.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import LayerName
from texforce_hub.apply.applied import fit_beside
from texforce_hub.apply.matching import LiveShapes, check_ready
from texforce_hub.apply.model import parts_of, unwrapped
from texforce_hub.apply.terms import make_pairs
from texforce_hub.apply.undoing import do_all
from texforce_hub.errors import ConfigError
from texforce_hub.hub.stack import StackEntry

WeightOf = Callable[[int, LayerName], Tensor]
"""The weight, a tensor without dimensions, of a layer of the stack's ``n``-th adapter."""


@contextmanager
def weighted_adapters(
    pipe: Any, entries: Sequence[StackEntry], weight_of: WeightOf, *, strict: bool = True
) -> Iterator[None]:
    """The stack beside a pipeline's layers, at weights that gradients flow through; the entries' own do not count.

    Raises:
        MatchError: an adapter does not fit.
        ConfigError: a layer that is not low rank (DoRA, LoHa, a norm).
    """
    live = LiveShapes(pipe)
    riding, other = fit_beside(entries, live, strict=strict)
    if other:
        raise ConfigError(f"{other}; weights of low-rank layers alone have a gradient")
    for part in dict.fromkeys(part for part, _, _ in riding):
        check_ready(part, parts_of(pipe)[part], attaching=True)
    hooks: list[Any] = []
    try:
        for (part, path, _), contributions in riding.items():
            layer = live.models[part].modules[path]
            pairs = [
                (pair, weight_of(index, name))
                for (index, name, *_), (pair, _) in zip(contributions, make_pairs(entries, contributions), strict=True)
            ]
            hooks.append(layer.register_forward_hook(_Weighted(unwrapped(layer), pairs)))
        yield
    finally:
        if raised := do_all([hook.remove for hook in hooks]):
            raise raised[0]


class _Weighted:
    """Adds weighted low-rank changes to what a layer gives: a forward hook."""

    def __init__(self, layer: nn.Module, pairs: Sequence[tuple[LowRank, Tensor]]) -> None:
        self._layer: Any = layer
        weight = layer.get_parameter("weight")
        self._pairs = [
            (pair.down.to(weight.device, weight.dtype), pair.up.to(weight.device, weight.dtype), pair.scale, factor)
            for pair, factor in pairs
        ]

    def __call__(self, _: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with the changes."""
        values: Tensor = given[0]
        for down, up, scale, factor in self._pairs:
            output = output + (factor * scale).to(output) * self._change(values.to(down), down, up).to(output)
        return output

    def _change(self, values: Tensor, down: Tensor, up: Tensor) -> Tensor:
        if isinstance(self._layer, nn.Linear):
            return functional.linear(functional.linear(values, down), up)
        layer = self._layer
        inner = functional.conv2d(values, down, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
        return functional.conv2d(inner, up[:, :, None, None])
