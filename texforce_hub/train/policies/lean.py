"""Frozen networks that keep less for the backward pass than torch would have them, for nothing: bits are the same.

Torch keeps what a convolution reads, though only a weight's gradient, which nobody wants, needs it; and of a gated
feed-forward layer it keeps the activated gate, which is quickly computed again. In the graph of Stable Diffusion's
U-Net that is more than a quarter of everything.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.nn import functional


@contextmanager
def keeping_little(*networks: nn.Module) -> Iterator[None]:
    """Have the networks' frozen convolutions keep nothing, and their gates what they are computed from."""
    modules = [module for network in networks for module in network.modules()]
    methods = [
        ("_conv_forward", partial(_convolve, m), m) for m in modules if isinstance(m, nn.Conv2d) and _is_plain(m)
    ]
    methods += [
        ("forward", partial(_gate, m), m) for m in modules if isinstance(m, GEGLU) and _keeps(m, "forward", GEGLU)
    ]
    try:
        for name, method, module in methods:
            setattr(module, name, method)
        yield
    finally:
        for name, _, module in methods:
            vars(module).pop(name, None)


def _is_plain(module: nn.Conv2d) -> bool:
    frozen = not any(p.requires_grad for p in module.parameters())
    padded = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return frozen and padded and _keeps(module, "_conv_forward", nn.Conv2d)


def _keeps(module: nn.Module, name: str, kind: type[nn.Module]) -> bool:
    """Whether a module's method is that of its kind: no subclass has another, and nobody has put one in its stead."""
    return getattr(type(module), name) is getattr(kind, name) and name not in vars(module)


def _convolve(module: nn.Conv2d, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = _Convolution.apply(images, weight, bias, module)  # type: ignore[no-untyped-call]
    return result


def _gate(module: GEGLU, states: Tensor) -> Tensor:
    def activate(both: Tensor) -> Tensor:
        values, gate = both.chunk(2, -1)
        activated: Tensor = values * module.gelu(gate)
        return activated

    result: Tensor = _Again.apply(module.proj(states), activate)  # type: ignore[no-untyped-call]
    return result


class _Convolution(torch.autograd.Function):
    """``(b, c, h, w)`` to ``(b, d, h', w')``, with a gradient for the images alone."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Conv2d) -> Tensor:
        ctx.options = module.stride, module.padding, module.dilation, module.groups
        ctx.shape, ctx.strides = images.shape, images.stride()
        ctx.save_for_backward(weight)
        return functional.conv2d(images, weight, bias, *ctx.options)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        images = gradients[0].new_empty_strided(ctx.shape, ctx.strides)  # read for its layout alone
        stride, padding, dilation, groups = ctx.options
        gradient, _, _ = torch.ops.aten.convolution_backward(
            gradients[0], images, weight, None, stride, padding, dilation, transposed=False, output_padding=[0, 0],
            groups=groups, output_mask=[True, False, False],
        )  # fmt: skip
        return gradient, None, None, None


class _Again(torch.autograd.Function):
    """A function without weights, computed again when the gradient comes back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(values)
        return function(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (values,) = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():  # as reentrant as a FLOP counter's hooks allow
            torch.autograd.backward(ctx.function(values), gradients[0])
        return values.grad, None
