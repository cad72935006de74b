"""The mathematics of TexForce: PPO on the steps of a denoising chain. Pure functions of tensors.

A chain of stochastic DDIM steps (arXiv 2010.02502, formula 12) is a Markov decision process whose policy is
the Gaussian of each step (DDPO, arXiv 2305.13301); the reward of the finished picture is every step's.
"""

import torch
from torch import Tensor

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


def group_advantages(rewards: Tensor, *, floor: float, clip: float) -> Tensor:
    """How much better than its group a picture is, in the group's standard deviations.

    Shapes:
        rewards: ``(prompts, images)``; the result has the same shape, in [-clip, clip]. A group of equal
        rewards gives exactly 0.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = torch.where(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0, centred)
    return (centred / (rewards.std(1, keepdim=True) + floor).clamp(min=1e-12)).clamp(-clip, clip)


def ppo_losses(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347, formula 7) as a loss, one value per entry."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
