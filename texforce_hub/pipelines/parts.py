"""A Stable Diffusion pipeline's parts, called one by one: what its ordinary call does, open to gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor


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
