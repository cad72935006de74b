"""Draw pictures with the current policy and remember every step: latents and log-probabilities."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from texforce_hub.train.policies.ddim import Steps, log_probability, make_steps, step_distribution
from texforce_hub.train.policies.stable_diffusion import Policy, in_slices


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
    steps: Steps


@torch.no_grad()
def sample_rollout(policy: Policy, prompts: Sequence[str], generator: Generator) -> Rollout:
    """Draw ``images_per_prompt`` pictures of every prompt with stochastic DDIM and keep every step."""
    config = policy.config
    steps = make_steps(policy.scheduler, config.inference_steps, policy.device)
    group = torch.arange(len(prompts), device=policy.device).repeat_interleave(config.images_per_prompt)
    chain = list(_denoise(policy, policy.encode(prompts)[group], steps, generator, config.eta))
    constant = policy.guided and not policy.trains_negative
    return Rollout(
        prompts=tuple(prompts),
        group=group,
        latents=torch.stack([chain[0].before, *(step.after for step in chain)], 1),
        log_probabilities=torch.stack([step.log_probability for step in chain], 1),
        unconditional=torch.stack([step.unconditional for step in chain], 1) if constant else None,
        images=policy.decode(chain[-1].after, batch=config.batch_size),
        steps=steps,
    )


@torch.no_grad()
def sample_images(policy: Policy, prompts: Sequence[str], *, images: int, steps: int, seed: int) -> Tensor:
    """``images`` pictures of every prompt by deterministic DDIM, ``(len(prompts) · images, 3, h, w)`` in [0, 1].

    The same seed gives the same starting noise, so that two policies can be compared picture by picture.
    """
    chain = make_steps(policy.scheduler, steps, policy.device)
    embeddings = policy.encode(prompts).repeat_interleave(images, 0)
    for step in _denoise(policy, embeddings, chain, Generator().manual_seed(seed), 0.0):
        latents = step.after
    return policy.decode(latents, batch=policy.config.batch_size)


class _Step(NamedTuple):
    """A denoising step: latents before and after, how probable that was, the negative prompt's prediction."""

    before: Tensor
    after: Tensor
    log_probability: Tensor
    unconditional: Any  # a Tensor; None without guidance


def _denoise(policy: Policy, embeddings: Tensor, steps: Steps, generator: Generator, eta: float) -> Iterator[_Step]:
    def noise() -> Tensor:
        return policy.draw_noise(len(embeddings), generator, resolution=policy.config.resolution)

    negative, latents = policy.encode_negative(), noise()
    for k, timestep in enumerate(steps.timesteps):
        conditional, unconditional = _predict_both(policy, latents, timestep, embeddings, negative)
        at = torch.full((len(latents),), k, device=policy.device)
        mean, std = step_distribution(latents, policy.guide(conditional, unconditional), at, steps, eta)
        after = mean + std * noise() if eta else mean
        yield _Step(latents, after, log_probability(after, mean, std), unconditional)
        latents = after


def _predict_both(
    policy: Policy, latents: Tensor, timestep: Tensor, embeddings: Tensor, negative: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The prompt's and the negative prompt's prediction, both in one U-Net call."""
    size = policy.config.batch_size
    if negative is None:
        return in_slices(lambda x, e: policy.predict(x, timestep, e), size, latents, embeddings), None

    def predict(some: Tensor, prompt: Tensor) -> Tensor:
        texts = torch.cat([prompt, negative.expand_as(prompt)])
        return torch.stack(policy.predict(some.repeat(2, 1, 1, 1), timestep, texts).chunk(2), 1)

    conditional, unconditional = in_slices(predict, size, latents, embeddings).unbind(1)
    return conditional, unconditional
