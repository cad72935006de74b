"""DDIM's denoising steps as the normal distributions they are, and their log-probabilities."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Steps:
    """The denoising steps of a chain, first to last.

    Shapes:
        timesteps, alpha, alpha_next: ``(s,)``; ``alpha`` is the cumulative product before a step,
        ``alpha_next`` the one after it
    """

    timesteps: Tensor
    alpha: Tensor
    alpha_next: Tensor
    prediction_type: str


def make_steps(scheduler: Any, steps: int, device: torch.device) -> Steps:
    """The ``steps`` denoising steps of a diffusers ``DDIMScheduler``, with that scheduler's own spacing."""
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    after = timesteps - scheduler.config.num_train_timesteps // steps
    alphas = scheduler.alphas_cumprod.float()
    alpha_next = torch.where(after >= 0, alphas[after.clamp(min=0)], scheduler.final_alpha_cumprod)
    return Steps(
        timesteps.to(device), alphas[timesteps].to(device), alpha_next.to(device), scheduler.config.prediction_type
    )


def step_distribution(
    latents: Tensor, prediction: Tensor, at: Tensor, steps: Steps, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean ``(b, c, h, w)`` and standard deviation ``(b, 1, 1, 1)`` of DDIM's next latents (arXiv 2010.02502, (12)).

    Shapes:
        latents, prediction: ``(b, c, h, w)``; at: ``(b,)``, indices into the steps
    """
    alpha = steps.alpha[at].view(-1, 1, 1, 1)
    alpha_next = steps.alpha_next[at].view(-1, 1, 1, 1)
    clean, noise = _clean_and_noise(latents, prediction, alpha, steps.prediction_type)
    variance = (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
    std = eta * variance.clamp(min=0).sqrt()
    return alpha_next.sqrt() * clean + (1 - alpha_next - std**2).clamp(min=0).sqrt() * noise, std


def _clean_and_noise(latents: Tensor, prediction: Tensor, alpha: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    if kind == "v_prediction":
        return signal * latents - spread * prediction, signal * prediction + spread * latents
    if kind == "sample":
        return prediction, (latents - signal * prediction) / spread
    return (latents - spread * prediction) / signal, prediction


_SMALLEST_STD = 1e-8


def log_probability(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of a step's outcome, **averaged over the latent's numbers**, ``(b,)``.

    The mean instead of the sum keeps ratios near 1 whatever the resolution, as in the published code; a
    clip range is therefore worth a range ``c·h·w`` times larger of the true log-ratio.
    """
    std = std.clamp(min=_SMALLEST_STD)
    return (-((latents - mean) ** 2) / (2 * std**2) - std.log()).mean((1, 2, 3)) - 0.5 * torch.log(
        torch.tensor(2 * torch.pi, device=latents.device)
    )


def step_divergence(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """Kullback–Leibler divergence of two steps of equal spread, averaged over the latent's numbers, ``(b,)``."""
    return ((mean - reference) ** 2 / (2 * std.clamp(min=_SMALLEST_STD) ** 2)).mean((1, 2, 3))
