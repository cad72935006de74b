"""What pictures are drawn from: rows of what text encoders say; and how a gradient comes back to them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Leaves = tuple[Tensor, ...]
"""What trained text encoders say of ``n`` prompts, float32: ``(n, length, width)``, or pooled ``(n, width)``."""


class Text(NamedTuple):
    """What the network reads of ``n`` prompts: what trained encoders say, and what others say, which never changes."""

    leaves: Leaves
    frozen: tuple[Tensor, ...] = ()

    def take(self, rows: Tensor) -> "Text":
        """Some of the rows, in this order."""
        return Text(*(tuple(tensor[rows] for tensor in part) for part in self))

    def beside(self, other: "Text") -> "Text":
        """These rows, then the other's."""
        return Text(*(tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(self, other, strict=True)))

    def opened(self) -> "Text":
        """The same with leaves of a new graph."""
        return Text(tuple(leaf.detach().clone().requires_grad_() for leaf in self.leaves), self.frozen)


class Rows(NamedTuple):
    """What pictures are drawn from, a row each.

    Shapes:
        group: ``(b,)``, each picture's prompt; prompt, negative: ``b`` rows; negative is ``None`` without guidance
    """

    group: Tensor
    prompt: Text
    negative: Text | None

    def take(self, chosen: Tensor) -> "Rows":
        """Some of the rows."""
        negative = None if self.negative is None else self.negative.take(chosen)
        return Rows(self.group[chosen], self.prompt.take(chosen), negative)


def pull(output: Tensor, leaves: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    """The gradients of ``Σ cotangent · output`` at leaves ``(b, …)`` that act on their own row of the output alone.

    What enters the network's backward pass has unit size in every row, and its true size is put back in float32
    afterwards: log-probabilities' gradients of 1e-7 would be nothing in float16.
    """
    size = cotangent.flatten(1).square().mean(1).sqrt()
    unit = cotangent / size.clamp(min=torch.finfo(size.dtype).tiny).view(-1, *[1] * (cotangent.ndim - 1))
    gradients = torch.autograd.grad(output, list(leaves), unit)
    return [g.float() * size.view(-1, *[1] * (g.ndim - 1)) for g in gradients]


def in_slices(function: Callable[..., Tensor], size: int, *tensors: Tensor) -> Tensor:
    """``function`` of at most ``size`` rows at a time, put together again."""
    return torch.cat([function(*rows) for rows in zip(*(torch.split(t, size) for t in tensors), strict=True)])
