"""Rectified flow's denoising steps, made stochastic as Flow-GRPO does (arXiv 2505.05470), all in float32."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from texforce_hub.errors import TrainingError
from texforce_hub.train.policies.steps import SMALLEST_SIGNAL, column


@dataclass(frozen=True, eq=False)
class FlowSteps:
    """The denoising steps of a chain, first to last; ``eta`` is the paper's noise level, 0 is the plain Euler step.

    Latents are ``(1 - sigma) · clean + sigma · noise``, the prediction is ``noise - clean``.

    Shapes:
        timesteps, sigma, sigma_next: ``(s,)``, noise before and after a step, from 1 down to 0
    """

    timesteps: Tensor
    sigma: Tensor
    sigma_next: Tensor
    eta: float

    @property
    def by_noise(self) -> Tensor:
        """By how much the prediction moves per unit of noise predicted, ``(s,)``."""
        return (1 - self.sigma).clamp(min=SMALLEST_SIGNAL**0.5).reciprocal()

    def step(self, latents: Tensor, prediction: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(b, c, h, w)`` and standard deviation ``(b, 1, 1, 1)`` of the next latents (formula 9 there)."""
        sigma, change = column(self.sigma, at), column(self.sigma_next - self.sigma, at)
        # At pure noise the diffusion would be infinite; the paper takes the next step's there.
        below = torch.where(sigma == 1, self.sigma_next[0], sigma)
        diffusion = self.eta * (sigma / (1 - below)).sqrt()
        share = diffusion**2 / (2 * sigma)
        mean = latents * (1 + share * change) + prediction * (1 + share * (1 - sigma)) * change
        return mean, diffusion * (-change).sqrt()

    def predict_clean(self, latents: Tensor, prediction: Tensor, at: Tensor) -> Tensor:
        """The finished latents ``(b, c, h, w)`` that a step's prediction promises."""
        return latents - column(self.sigma, at) * prediction

    def add_noise(self, clean: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """Finished latents as noisy as they are before a step."""
        sigma = column(self.sigma, at)
        return (1 - sigma) * clean + sigma * noise


def as_flow(scheduler: Any) -> Any:
    """A pipeline's scheduler as the Euler steps of rectified flow.

    Raises:
        TrainingError: it is another one.
    """
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.get("invert_sigmas"):
        kind = type(scheduler).__name__
        raise TrainingError(f"the base is sampled by {kind}; training needs its FlowMatchEulerDiscreteScheduler")
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)


def make_flow_steps(
    scheduler: Any, steps: int, eta: float, device: torch.device, *, tokens: int, sigmas: Sequence[float] | None = None
) -> FlowSteps:
    """The ``steps`` denoising steps of a diffusers ``FlowMatchEulerDiscreteScheduler``.

    Args:
        tokens: of a picture, by which a scheduler with dynamic shifting chooses its noise.
        sigmas: noise before every step, before it is shifted; by default the scheduler's own.
    """
    config, given = scheduler.config, {} if sigmas is None else {"sigmas": list(sigmas)}
    if config.get("use_dynamic_shifting"):
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        given["mu"] = low + (high - low) * (tokens - few) / (many - few)
    scheduler.set_timesteps(steps, **given)
    sigma = scheduler.sigmas.float().to(device)
    return FlowSteps(scheduler.timesteps.float().to(device), sigma[:-1], sigma[1:], eta)
