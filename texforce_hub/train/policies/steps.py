"""Denoising steps as the normal distributions they are, and which of them have something to teach."""

import math
from typing import Protocol

import torch
from torch import Tensor

from texforce_hub.errors import TrainingError

SENSITIVE = 2.0
"""A step whose mean moves by more deviations than this per unit of noise predicted drowns all others in its own."""
SMALLEST_SIGNAL = 4e-3
"""Signal power of Stable Diffusion's first step; below it, no noise can be told from the latents."""
_SMALLEST_STD = 1e-8


class Steps(Protocol):
    """The ``s`` denoising steps of a chain, first to last; ``at (b,)`` are indices into them."""

    @property
    def timesteps(self) -> Tensor:
        """``(s,)``, as the network takes them."""

    @property
    def by_noise(self) -> Tensor:
        """By how much the prediction moves per unit of noise predicted, ``(s,)``."""

    def step(self, latents: Tensor, prediction: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(b, c, h, w)`` and standard deviation ``(b, 1, 1, 1)`` of the next latents."""

    def predict_clean(self, latents: Tensor, prediction: Tensor, at: Tensor) -> Tensor:
        """The finished latents ``(b, c, h, w)`` that a step's prediction promises."""

    def add_noise(self, clean: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """Finished latents as noisy as they are before a step."""


def column(values: Tensor, at: Tensor) -> Tensor:
    """A number of every picture's own step, ``(b, 1, 1, 1)``."""
    return values[at].view(-1, 1, 1, 1)


def slopes(steps: Steps) -> Tensor:
    """By how many standard deviations a step's mean moves per unit of prediction, ``(s,)``, signed.

    0 where a step has no noise: its outcome is no choice, and teaches nothing.
    """
    at = torch.arange(len(steps.timesteps), device=steps.timesteps.device)
    zero = torch.zeros(len(at), 1, 1, 1, device=at.device)
    origin, std = steps.step(zero, zero, at)
    moved, _ = steps.step(zero, zero + 1, at)
    return torch.where(std > _SMALLEST_STD, (moved - origin) / std.clamp(min=_SMALLEST_STD), 0.0).flatten()


def sensitivity(steps: Steps) -> Tensor:
    """``w = |d mean / d noise| / std`` of every step, ``(s,)``: a matter of the schedule alone, whatever is predicted.

    The noise that a step adds to a policy gradient is w² times that of its neighbours (measured on ``shapes``), its
    signal is not: in Stable Diffusion's own spacing the last step but one has 53 % of all w² at 50 steps, 95 % at 5.
    """
    return slopes(steps).abs() * steps.by_noise


def grade_steps(steps: Steps, share: float) -> list[int]:
    """The steps to learn from: the first ``share`` of those with noise that are not too sensitive.

    Too sensitive is ``w > 2``, in short chains more than twice the median.

    Raises:
        TrainingError: no step qualifies, as in the one-step chain of a turbo model.
    """
    w = sensitivity(steps)
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
