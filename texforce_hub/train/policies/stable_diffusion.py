"""A Stable Diffusion pipeline as a policy: what its ordinary call does, step by step and open to gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from texforce_hub.errors import TrainingError
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.policies.ddim import Steps, make_steps, step_distribution
from texforce_hub.train.policies.policy import Rows, in_slices


@dataclass(frozen=True, eq=False)
class StableDiffusion:
    """A frozen pipeline with one text encoder, and the copy of that encoder that carries the LoRA."""

    pipeline: Any
    encoder: Any
    scheduler: Any  # diffusers' DDIMScheduler of the pipeline's noise
    config: TrainConfig

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        device: torch.device = self.pipeline.unet.device
        return device

    @property
    def reference(self) -> "StableDiffusion":
        """The same with the text encoder as it was."""
        return replace(self, encoder=self.pipeline.text_encoder)

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on; as in diffusers, up to 1 it is not."""
        return self.config.guidance > 1

    @property
    def trains_negative(self) -> bool:
        """Whether the negative prompt's embedding has a gradient."""
        return self.guided and self.config.uncond == "full"

    def make_steps(self, count: int) -> Steps:
        """The denoising steps of a chain of ``count``."""
        return make_steps(self.scheduler, count, self.device)

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """The prompts, and the negative one if it is trained, too."""
        return [*prompts, *([self.config.negative_prompt] if self.trains_negative else [])]

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings ``(len(texts), length, width)``, padded and cut as the pipeline itself does."""
        tokenizer = self.pipeline.tokenizer
        length = tokenizer.model_max_length
        batch = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        embeddings: Tensor = self.encoder(batch.input_ids.to(self.device))[0]
        return embeddings.float()

    @torch.no_grad()
    def rows(self, prompts: Sequence[str], images: int) -> Rows:
        """What ``images`` pictures of every prompt are drawn from, prompt by prompt."""
        group = torch.arange(len(prompts), device=self.device).repeat_interleave(images)
        prompt, negative = self.encode(prompts)[group], None
        if self.guided:
            encoder = self.reference if self.config.uncond == "base" else self
            negative = encoder.encode([self.config.negative_prompt]).expand_as(prompt)
        return Rows(group, prompt, negative)

    def leaves(self, rows: Rows) -> tuple[Rows, tuple[Tensor, ...]]:
        """The rows anew, with those embeddings that are trained as leaves of a graph."""
        prompt, negative = rows.prompt.clone().requires_grad_(), rows.negative
        if not self.trains_negative or negative is None:
            return rows._replace(prompt=prompt), (prompt,)
        negative = negative.clone().requires_grad_()
        return Rows(rows.group, prompt, negative), (prompt, negative)

    def gather(self, group: Tensor, gradients: Sequence[Tensor], prompts: int) -> Tensor:
        """The pictures' gradients ``(b, length, width)``, one a leaf, summed to those of the texts."""
        total = gradients[0].new_zeros(prompts + len(gradients) - 1, *gradients[0].shape[1:])
        total.index_add_(0, group, gradients[0])
        for negative in gradients[1:]:
            total[-1] += negative.sum(0)
        return total

    def predict(self, latents: Tensor, timesteps: Tensor, rows: Rows) -> Tensor:
        """The prediction ``(b, c, h, w)`` under classifier-free guidance (arXiv 2207.12598), float32."""
        if rows.negative is None:
            return self._unet(latents, timesteps, rows.prompt)
        if torch.is_grad_enabled():
            with torch.set_grad_enabled(rows.negative.requires_grad):
                negative = self._unet(latents, timesteps, rows.negative)
            prompt = self._unet(latents, timesteps, rows.prompt)
        else:
            both = torch.cat([rows.prompt, rows.negative])
            times = timesteps.repeat(2) if timesteps.ndim else timesteps
            prompt, negative = self._unet(latents.repeat(2, 1, 1, 1), times, both).chunk(2)
        return negative + self.config.guidance * (prompt - negative)

    def _unet(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        unet = self.pipeline.unet
        output = unet(latents.to(unet.dtype), timesteps, encoder_hidden_states=embeddings.to(unet.dtype)).sample
        prediction: Tensor = output.float()
        return prediction

    def draw_noise(self, count: int, generator: Generator) -> Tensor:
        """``count`` latents of pure noise, drawn on the CPU: every device gets the same."""
        unet, resolution = self.pipeline.unet.config, self.config.resolution
        side = resolution // self.pipeline.vae_scale_factor if resolution else unet.sample_size
        return torch.randn((count, unet.in_channels, side, side), generator=generator).to(self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures ``(b, 3, h, w)`` in [0, 1], float32; a saturated pixel has a gradient, so that it can come back."""
        vae = self.pipeline.vae.to(self.device)

        def decode_some(some: Tensor) -> Tensor:
            pixels: Tensor = vae.decode(some.to(vae.dtype) / vae.config.scaling_factor).sample.float() / 2 + 0.5
            return pixels.detach().clamp(0, 1) + (pixels - pixels.detach())

        images = in_slices(decode_some, self.config.batch_size, latents)
        if self.config.offload:
            vae.to("cpu")
        return images


@torch.no_grad()
def sample_images(policy: StableDiffusion, prompts: Sequence[str], *, images: int, steps: int, seed: int) -> Tensor:
    """``images`` pictures of every prompt by deterministic DDIM, ``(len(prompts) · images, 3, h, w)`` in [0, 1].

    The same seed gives the same starting noise, so that two policies can be compared picture by picture.
    """
    chain, rows = policy.make_steps(steps), policy.rows(prompts, images)
    latents = policy.draw_noise(len(rows.group), Generator().manual_seed(seed))
    for k, timestep in enumerate(chain.timesteps):

        def move(some: Tensor, index: Tensor, k: int = k, timestep: Tensor = timestep) -> Tensor:
            prediction = policy.predict(some, timestep, rows.take(index))
            return step_distribution(some, prediction, torch.full_like(index, k), chain, 0.0)[0]

        index = torch.arange(len(latents), device=latents.device)
        latents = in_slices(move, policy.config.batch_size, latents, index)
    return policy.decode(latents)


@contextmanager
def frozen(pipeline: Any, *, checkpointing: bool = False, tiling: bool = False) -> Iterator[None]:
    """No gradient for the pipeline's weights and no dropout; afterwards all as before, the VAE where it was.

    ``checkpointing`` recomputes the U-Net's activations in the backward pass instead of keeping them; with
    ``tiling`` the VAE decodes large pictures in tiles.

    Raises:
        TrainingError: ``checkpointing`` with a U-Net that has dropout: its training mode would change pictures.
    """
    modules = [pipeline.text_encoder, pipeline.unet, pipeline.vae]
    wanted = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    modes = [(module, module.training) for module in modules]
    unet, was = pipeline.unet, getattr(pipeline.unet, "is_gradient_checkpointing", False)
    vae, device, tiled = pipeline.vae, pipeline.vae.device, getattr(pipeline.vae, "use_tiling", False)
    try:
        for module in modules:
            module.requires_grad_(requires_grad=False).eval()
        if checkpointing:
            if any(isinstance(module, nn.Dropout) and module.p > 0 for module in unet.modules()):
                raise TrainingError("the U-Net has dropout, which gradient checkpointing would switch on; leave it out")
            unet.enable_gradient_checkpointing()
            unet.train()
        if tiling:
            vae.enable_tiling()
        yield
    finally:
        vae.to(device)
        if tiling and not tiled:
            vae.disable_tiling()
        if checkpointing and not was:
            unet.disable_gradient_checkpointing()
        for parameter, before in wanted:
            parameter.requires_grad_(before)
        for module, training in modes:
            module.train(training)
