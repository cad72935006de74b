"""DDIM's denoising steps, for networks that were trained on the noise of a beta schedule."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from texforce_hub.errors import TrainingError
from texforce_hub.train.policies.steps import SMALLEST_SIGNAL, column


@dataclass(frozen=True, eq=False)
class DDIMSteps:
    """The denoising steps of a chain, first to last; with ``eta`` 1 they are ancestral, with 0 without noise.

    Shapes:
        timesteps, alpha, alpha_next: ``(s,)``; ``alpha`` is the cumulative product before a step,
        ``alpha_next`` the one after it
    """

    timesteps: Tensor
    alpha: Tensor
    alpha_next: Tensor
    prediction_type: str
    eta: float

    @property
    def by_noise(self) -> Tensor:
        """By how much the prediction moves per unit of noise predicted, ``(s,)``."""
        alpha = self.alpha.clamp(min=SMALLEST_SIGNAL)
        known = {"v_prediction": alpha.rsqrt(), "sample": ((1 - alpha) / alpha).sqrt()}
        return known.get(self.prediction_type, torch.ones_like(alpha))

    def step(self, latents: Tensor, prediction: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(b, c, h, w)`` and standard deviation ``(b, 1, 1, 1)`` of the next (arXiv 2010.02502, (12))."""
        alpha, alpha_next = column(self.alpha, at), column(self.alpha_next, at)
        clean, noise = self._clean_and_noise(latents, prediction, alpha)
        variance = (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
        std = self.eta * variance.clamp(min=0).sqrt()
        return alpha_next.sqrt() * clean + (1 - alpha_next - std**2).clamp(min=0).sqrt() * noise, std

    def predict_clean(self, latents: Tensor, prediction: Tensor, at: Tensor) -> Tensor:
        """The finished latents ``(b, c, h, w)`` that a step's prediction promises."""
        return self._clean_and_noise(latents, prediction, column(self.alpha, at))[0]

    def add_noise(self, clean: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """Finished latents as noisy as they are before a step."""
        alpha = column(self.alpha, at)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def _clean_and_noise(self, latents: Tensor, prediction: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        if self.prediction_type == "v_prediction":
            return signal * latents - spread * prediction, signal * prediction + spread * latents
        if self.prediction_type == "sample":
            return prediction, (latents - signal * prediction) / spread
        return (latents - spread * prediction) / signal, prediction


def as_ddim(scheduler: Any) -> Any:
    """A pipeline's scheduler as DDIM on the same noise.

    Raises:
        TrainingError: it belongs to another kind of noise, or to a prediction that its noise does not allow.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    if kind.startswith("Flow") or config.get("use_flow_sigmas") or "sigma_data" in config:
        what = "EDM" if "sigma_data" in config else "flow matching"
        raise TrainingError(f"the base's U-Net is sampled by {what} ({kind}); training knows noise of betas there")
    # Latents have no range to be clipped to, whatever an old configuration leaves unsaid.
    ddim = DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
    if ddim.config.prediction_type == "epsilon" and ddim.alphas_cumprod[-1] <= 0:
        raise TrainingError(
            "the base's noise ends at zero signal, where a prediction of noise says nothing; such a base predicts "
            'v: set prediction_type = "v_prediction" in its scheduler_config.json'
        )
    return ddim


def make_ddim_steps(scheduler: Any, steps: int, eta: float, device: torch.device) -> DDIMSteps:
    """The ``steps`` denoising steps of a diffusers ``DDIMScheduler``, with that scheduler's own spacing.

    Raises:
        TrainingError: more steps than the base was trained on.
    """
    if steps > (most := scheduler.config.num_train_timesteps):
        raise TrainingError(f"{steps} denoising steps; the base was trained on {most}, expected at most so many")
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    after = timesteps - scheduler.config.num_train_timesteps // steps
    alphas = scheduler.alphas_cumprod.float()
    alpha_next = torch.where(after >= 0, alphas[after.clamp(min=0)], scheduler.final_alpha_cumprod)
    kind = scheduler.config.prediction_type
    return DDIMSteps(timesteps.to(device), alphas[timesteps].to(device), alpha_next.to(device), kind, eta)
