"""Draw pictures with the current policy and remember every step: latents and log-probabilities."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from texforce_hub.train.policies.ddim import Schedule, log_probability, make_schedule, step_distribution
from texforce_hub.train.policies.stable_diffusion import Actor, in_slices


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
    steps = list(_denoise(actor, actor.encode(prompts)[group], schedule, generator, config.eta))
    constant = actor.guided and not actor.trains_negative
    return Rollout(
        prompts=tuple(prompts),
        group=group,
        latents=torch.stack([steps[0].before, *(step.after for step in steps)], 1),
        log_probabilities=torch.stack([step.log_probability for step in steps], 1),
        unconditional=torch.stack([step.unconditional for step in steps], 1) if constant else None,
        images=actor.decode(steps[-1].after, batch=config.batch),
        schedule=schedule,
    )


@torch.no_grad()
def sample_images(actor: Actor, prompts: Sequence[str], *, images: int, steps: int, seed: int) -> Tensor:
    """``images`` pictures of every prompt by deterministic DDIM, ``(len(prompts) · images, 3, h, w)`` in [0, 1].

    The same seed gives the same starting noise, so that two policies can be compared picture by picture.
    """
    schedule = make_schedule(actor.scheduler, steps, actor.device)
    embeddings = actor.encode(prompts).repeat_interleave(images, 0)
    for step in _denoise(actor, embeddings, schedule, Generator().manual_seed(seed), 0.0):
        latents = step.after
    return actor.decode(latents, batch=actor.config.batch)


class _Step(NamedTuple):
    """A denoising step: latents before and after, how probable that was, the negative prompt's prediction."""

    before: Tensor
    after: Tensor
    log_probability: Tensor
    unconditional: Any  # a Tensor; None without guidance


def _denoise(actor: Actor, embeddings: Tensor, schedule: Schedule, generator: Generator, eta: float) -> Iterator[_Step]:
    def noise() -> Tensor:
        return actor.draw_noise(len(embeddings), generator, resolution=actor.config.resolution)

    negative, latents = actor.encode_negative(), noise()
    for k, timestep in enumerate(schedule.timesteps):
        conditional, unconditional = _predict_both(actor, latents, timestep, embeddings, negative)
        at = torch.full((len(latents),), k, device=actor.device)
        mean, std = step_distribution(latents, actor.guide(conditional, unconditional), at, schedule, eta)
        after = mean + std * noise() if eta else mean
        yield _Step(latents, after, log_probability(after, mean, std), unconditional)
        latents = after


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
