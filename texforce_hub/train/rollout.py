"""Draw pictures with the current policy and remember every step: latents and log-probabilities."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from texforce_hub.train.config import TrainConfig
from texforce_hub.train.policy import Schedule, log_probability, make_schedule, step_distribution


@dataclass(frozen=True, eq=False)
class Actor:
    """A frozen pipeline with an adapted copy of its text encoder; the pipeline keeps its own, the reference."""

    pipeline: Any
    encoder: Any  # the copy that carries the LoRA
    scheduler: Any  # diffusers' DDIMScheduler of the pipeline's noise
    config: TrainConfig

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        device: torch.device = self.pipeline.unet.device
        return device

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on; as in diffusers, up to 1 it is not."""
        return self.config.guidance > 1

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids ``(len(prompts), length)``, padded and cut as the pipeline itself does."""
        tokenizer = self.pipeline.tokenizer
        length = tokenizer.model_max_length
        batch = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids: Tensor = batch.input_ids
        return ids.to(self.device)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings ``(len(prompts), length, width)`` by the adapted encoder."""
        embeddings: Tensor = self.encoder(self.tokenize(prompts))[0]
        return embeddings

    @torch.no_grad()
    def encode_reference(self, prompts: Sequence[str]) -> Tensor:
        """The same by the frozen encoder."""
        embeddings: Tensor = self.pipeline.text_encoder(self.tokenize(prompts))[0]
        return embeddings

    def encode_negative(self) -> Tensor | None:
        """The negative prompt's embedding ``(1, length, width)`` as ``uncond`` says; ``None`` without guidance."""
        if not self.guided:
            return None
        if self.config.uncond == "base":
            return self.encode_reference([self.config.negative_prompt])
        with torch.set_grad_enabled(self.config.uncond == "full" and torch.is_grad_enabled()):
            return self.encode([self.config.negative_prompt])

    def predict(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """The U-Net's output ``(b, c, h, w)`` in float32."""
        unet = self.pipeline.unet
        output = unet(latents.to(unet.dtype), timesteps, encoder_hidden_states=embeddings.to(unet.dtype)).sample
        prediction: Tensor = output.float()
        return prediction

    def guide(self, conditional: Tensor, unconditional: Tensor | None) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598)."""
        if unconditional is None:
            return conditional
        return unconditional + self.config.guidance * (conditional - unconditional)

    def draw_noise(self, count: int, generator: Generator) -> Tensor:
        """``count`` latents of pure noise, drawn on the CPU: every device gets the same."""
        unet, config = self.pipeline.unet.config, self.config
        side = config.resolution // self.pipeline.vae_scale_factor if config.resolution else unet.sample_size
        return torch.randn((count, unet.in_channels, side, side), generator=generator).to(self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures ``(b, 3, h, w)`` in [0, 1], float32."""
        vae = self.pipeline.vae

        def decode_some(some: Tensor) -> Tensor:
            pixels: Tensor = vae.decode(some.to(vae.dtype) / vae.config.scaling_factor).sample
            return (pixels.float() / 2 + 0.5).clamp(0, 1)

        return in_slices(decode_some, self.config.batch, latents)


@dataclass(frozen=True, eq=False)
class Rollout:
    """Pictures and how they came about; ``b`` pictures, ``s`` denoising steps.

    Shapes:
        group: ``(b,)``, each picture's prompt; latents: ``(b, s + 1, c, h, w)``, first the noise;
        log_probabilities: ``(b, s)``; unconditional: ``(b, s, c, h, w)``, the negative prompt's prediction,
        where it is constant in training; images: ``(b, 3, h, w)`` in [0, 1]
    """

    prompts: tuple[str, ...]
    group: Tensor
    latents: Tensor
    log_probabilities: Tensor
    unconditional: Tensor | None
    images: Tensor
    schedule: Schedule


@torch.no_grad()
def sample_rollout(actor: Actor, prompts: Sequence[str], generator: Generator) -> Rollout:
    """Draw ``images_per_prompt`` pictures of every prompt with stochastic DDIM and keep every step."""
    config = actor.config
    schedule = make_schedule(actor.scheduler, config.inference_steps, actor.device)
    group = torch.arange(len(prompts), device=actor.device).repeat_interleave(config.images_per_prompt)
    embeddings, negative = actor.encode(prompts)[group], actor.encode_negative()
    latents = actor.draw_noise(len(group), generator)
    states, log_probabilities, unconditionals = [latents], [], []
    for k in range(config.inference_steps):
        conditional, unconditional = _predict_both(actor, latents, schedule.timesteps[k], embeddings, negative)
        at = torch.full((len(group),), k, device=actor.device)
        mean, std = step_distribution(latents, actor.guide(conditional, unconditional), at, schedule, config.eta)
        latents = mean + std * actor.draw_noise(len(group), generator)
        states.append(latents)
        log_probabilities.append(log_probability(latents, mean, std))
        unconditionals.append(unconditional)
    constant = actor.guided and config.uncond != "full"
    return Rollout(
        prompts=tuple(prompts),
        group=group,
        latents=torch.stack(states, 1),
        log_probabilities=torch.stack(log_probabilities, 1),
        unconditional=torch.stack([u for u in unconditionals if u is not None], 1) if constant else None,
        images=actor.decode(latents),
        schedule=schedule,
    )


@torch.no_grad()
def sample_images(actor: Actor, prompts: Sequence[str], *, images: int, steps: int, seed: int) -> Tensor:
    """``images`` pictures of every prompt by deterministic DDIM, ``(len(prompts) · images, 3, h, w)`` in [0, 1].

    The same seed gives the same starting noise, so that two policies can be compared picture by picture.
    """
    schedule = make_schedule(actor.scheduler, steps, actor.device)
    embeddings, negative = actor.encode(prompts).repeat_interleave(images, 0), actor.encode_negative()
    latents = actor.draw_noise(len(embeddings), Generator().manual_seed(seed))
    for k in range(steps):
        prediction = actor.guide(*_predict_both(actor, latents, schedule.timesteps[k], embeddings, negative))
        at = torch.full((len(latents),), k, device=actor.device)
        latents, _ = step_distribution(latents, prediction, at, schedule, 0.0)
    return actor.decode(latents)


def in_slices(function: Callable[..., Tensor], size: int, *tensors: Tensor) -> Tensor:
    """``function`` of at most ``size`` rows at a time, put together again."""
    return torch.cat([function(*rows) for rows in zip(*(torch.split(t, size) for t in tensors), strict=True)])


def _predict_both(
    actor: Actor, latents: Tensor, timestep: Tensor, embeddings: Tensor, negative: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The prompt's and the negative prompt's prediction, both in one U-Net call."""
    size = actor.config.batch
    if negative is None:
        return in_slices(lambda x, e: actor.predict(x, timestep, e), size, latents, embeddings), None

    def predict(some: Tensor, prompt: Tensor) -> Tensor:
        texts = torch.cat([prompt, negative.expand_as(prompt)])
        return torch.stack(actor.predict(some.repeat(2, 1, 1, 1), timestep, texts).chunk(2), 1)

    conditional, unconditional = in_slices(predict, size, latents, embeddings).unbind(1)
    return conditional, unconditional
