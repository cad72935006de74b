"""A Stable Diffusion pipeline's parts, called one by one: what its ordinary call does, open to gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from texforce_hub.train.config import TrainConfig


@dataclass(frozen=True, eq=False)
class Parts:
    """A pipeline with one text encoder; ``encoder`` is that one, or a copy that stands in for it."""

    pipeline: Any
    encoder: Any

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        device: torch.device = self.pipeline.unet.device
        return device

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids ``(len(prompts), length)``, padded and cut as the pipeline itself does."""
        tokenizer = self.pipeline.tokenizer
        length = tokenizer.model_max_length
        batch = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids: Tensor = batch.input_ids
        return ids.to(self.device)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings ``(len(prompts), length, width)`` by ``encoder``."""
        embeddings: Tensor = self.encoder(self.tokenize(prompts))[0]
        return embeddings

    def predict(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """The U-Net's output ``(b, c, h, w)`` in float32."""
        unet = self.pipeline.unet
        output = unet(latents.to(unet.dtype), timesteps, encoder_hidden_states=embeddings.to(unet.dtype)).sample
        prediction: Tensor = output.float()
        return prediction

    def draw_noise(self, count: int, generator: Generator, *, resolution: int | None = None) -> Tensor:
        """``count`` latents of pure noise, drawn on the CPU: every device gets the same."""
        unet = self.pipeline.unet.config
        side = resolution // self.pipeline.vae_scale_factor if resolution else unet.sample_size
        return torch.randn((count, unet.in_channels, side, side), generator=generator).to(self.device)

    def decode(self, latents: Tensor, *, batch: int) -> Tensor:
        """Pictures ``(b, 3, h, w)`` in [0, 1], float32, ``batch`` at a time."""
        vae = self.pipeline.vae

        def decode_some(some: Tensor) -> Tensor:
            pixels: Tensor = vae.decode(some.to(vae.dtype) / vae.config.scaling_factor).sample
            return (pixels.float() / 2 + 0.5).clamp(0, 1)

        return in_slices(decode_some, batch, latents)


def in_slices(function: Callable[..., Tensor], size: int, *tensors: Tensor) -> Tensor:
    """``function`` of at most ``size`` rows at a time, put together again."""
    return torch.cat([function(*rows) for rows in zip(*(torch.split(t, size) for t in tensors), strict=True)])


@contextmanager
def frozen(pipeline: Any) -> Iterator[None]:
    """No gradient for the pipeline's weights, and no dropout; afterwards both as before."""
    modules = [pipeline.text_encoder, pipeline.unet, pipeline.vae]
    wanted = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    modes = [(module, module.training) for module in modules]
    try:
        for module in modules:
            module.requires_grad_(requires_grad=False).eval()
        yield
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)
        for module, training in modes:
            module.train(training)


@dataclass(frozen=True, eq=False)
class Policy(Parts):
    """A frozen pipeline and the copy of its text encoder that carries the LoRA: the policy."""

    scheduler: Any  # diffusers' DDIMScheduler of the pipeline's noise
    config: TrainConfig

    @property
    def reference(self) -> "Policy":
        """The same with the frozen encoder."""
        return replace(self, encoder=self.pipeline.text_encoder)

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on; as in diffusers, up to 1 it is not."""
        return self.config.guidance > 1

    @property
    def trains_negative(self) -> bool:
        """Whether the negative prompt's embedding has a gradient."""
        return self.guided and self.config.uncond == "full"

    def encode_negative(self) -> Tensor | None:
        """The negative prompt's embedding ``(1, length, width)`` as ``uncond`` says; ``None`` without guidance."""
        encoder = self.reference if self.config.uncond == "base" else self
        return encoder.encode([self.config.negative_prompt]) if self.guided else None

    def guide(self, conditional: Tensor, unconditional: Tensor | None) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598)."""
        if unconditional is None:
            return conditional
        return unconditional + self.config.guidance * (conditional - unconditional)
