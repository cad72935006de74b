"""The contract: a policy encodes prompts, denoises step by step, and decodes; gradients come back to the embeddings."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from texforce_hub.train.config import TrainConfig
from texforce_hub.train.policies.steps import Steps

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


class Policy(Protocol):
    """Everything that an algorithm asks of a pipeline whose text encoders carry the LoRA."""

    @property
    def config(self) -> TrainConfig:
        """The run's settings."""

    @property
    def reference(self) -> "Policy":
        """The same with the text encoders as they were."""

    def make_steps(self, count: int, *, noisy: bool = True) -> Steps:
        """The denoising steps of a chain, with the noise that the settings say or without any."""

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """The texts whose embeddings have a gradient: the prompts, and the negative one if it is trained, too."""

    def encode(self, texts: Sequence[str]) -> Leaves:
        """What the trained text encoders say of them."""

    def rows(self, prompts: Sequence[str], images: int) -> Rows:
        """What ``images`` pictures of every prompt are drawn from, without gradient."""

    def leaves(self, rows: Rows) -> tuple[Rows, Leaves]:
        """The rows anew, with those embeddings that are trained as leaves of a graph."""

    def gather(self, group: Tensor, gradients: Sequence[Tensor], prompts: int) -> Leaves:
        """The leaves' gradients, a row a picture, summed to those of so many prompts' texts."""

    def predict(self, latents: Tensor, timesteps: Tensor, rows: Rows) -> Tensor:
        """The guided prediction ``(b, c, h, w)``, float32."""

    def draw_noise(self, count: int, generator: Generator) -> Tensor:
        """``count`` latents of pure noise ``(count, c, h, w)``, the same on every device."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures ``(b, 3, h, w)`` in [0, 1], float32; gradients pass through the clamp."""


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
