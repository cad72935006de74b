"""DDIM's denoising steps as the normal distributions they are, and which of them have something to teach."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from texforce_hub.errors import TrainingError

SENSITIVE = 2.0
"""A step whose mean moves by more deviations than this per unit of noise predicted drowns all others in its own."""
_SMALLEST_STD = 1e-8
_PURE_NOISE = 4e-3  # alpha of Stable Diffusion's first step; below it, no noise can be told from the latents


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


def predict_clean(latents: Tensor, prediction: Tensor, at: Tensor, steps: Steps) -> Tensor:
    """The finished latents ``(b, c, h, w)`` that a step's prediction promises."""
    return _clean_and_noise(latents, prediction, steps.alpha[at].view(-1, 1, 1, 1), steps.prediction_type)[0]


def _clean_and_noise(latents: Tensor, prediction: Tensor, alpha: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    if kind == "v_prediction":
        return signal * latents - spread * prediction, signal * prediction + spread * latents
    if kind == "sample":
        return prediction, (latents - signal * prediction) / spread
    return (latents - spread * prediction) / signal, prediction


def slopes(steps: Steps, eta: float) -> Tensor:
    """By how many standard deviations a step's mean moves per unit of prediction, ``(s,)``, signed.

    0 where a step has no noise: its outcome is no choice, and teaches nothing.
    """
    at = torch.arange(len(steps.timesteps), device=steps.alpha.device)
    zero = torch.zeros(len(at), 1, 1, 1, device=at.device)
    origin, std = step_distribution(zero, zero, at, steps, eta)
    moved, _ = step_distribution(zero, zero + 1, at, steps, eta)
    return torch.where(std > _SMALLEST_STD, (moved - origin) / std.clamp(min=_SMALLEST_STD), 0.0).flatten()


def sensitivity(steps: Steps, eta: float) -> Tensor:
    """``w = |d mean / d noise| / std`` of every step, ``(s,)``: a matter of the schedule alone, whatever is predicted.

    The noise that a step adds to a policy gradient is w² times that of its neighbours (measured on ``shapes``), its
    signal is not: in Stable Diffusion's own spacing the last step but one has 53 % of all w² at 50 steps, 95 % at 5.
    """
    alpha = steps.alpha.clamp(min=_PURE_NOISE)
    by_noise = {"v_prediction": alpha.rsqrt(), "sample": ((1 - alpha) / alpha).sqrt()}  # d prediction / d noise
    return slopes(steps, eta).abs() * by_noise.get(steps.prediction_type, 1.0)


def grade_steps(steps: Steps, eta: float, share: float) -> list[int]:
    """The steps to learn from: the first ``share`` of those with noise that are not too sensitive.

    Too sensitive is ``w > 2``, in short chains more than twice the median.

    Raises:
        TrainingError: no step qualifies, as in the one-step chain of a turbo model.
    """
    w = sensitivity(steps, eta)
    noisy = w[w > 0]
    limit = max(SENSITIVE, 2 * noisy.median().item()) if len(noisy) > 1 else SENSITIVE
    able = (w > 0) & (w <= limit)
    indices = able.nonzero().flatten().tolist()
    if not indices:
        raise TrainingError(
            f"none of the {len(w)} denoising steps has noise to learn from (sensitivities "
            f"{', '.join(f'{x:.2g}' for x in w.tolist())}; expected one in (0, {limit:.2g}]); take more "
            "--inference-steps, or --algorithm direct with a differentiable reward"
        )
    return indices[: max(1, math.ceil(share * len(indices)))]


def log_probability(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of a step's outcome **averaged over the latent's numbers**, ``(b,)``.

    The mean instead of the sum keeps ratios near 1 whatever the resolution, as in the published code.
    """
    std = std.clamp(min=_SMALLEST_STD)
    return (-((latents - mean) ** 2) / (2 * std**2) - std.log()).mean((1, 2, 3)) - 0.5 * math.log(2 * math.pi)
