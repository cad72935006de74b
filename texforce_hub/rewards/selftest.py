"""Whether a reward can be used: two made-up pictures are scored twice."""

from typing import Any

import torch

from texforce_hub.errors import RewardError
from texforce_hub.rewards.reward import resolve_reward

_PROMPT = "a red circle"  # a sentence of the shapes world too
_SIDE = 64


def try_reward(spec: str, device: torch.device) -> dict[str, Any]:
    """Scores of a grey ramp and of noise, and the largest entry of their gradient (``None`` without one).

    Raises:
        RewardError: it cannot be loaded, is not finite, or scores the same pictures otherwise the second time.
    """
    reward = resolve_reward(spec, device)
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, _SIDE).expand(3, _SIDE, _SIDE)
    noise = torch.rand(3, _SIDE, _SIDE, generator=generator)
    pictures = torch.stack([ramp, noise]).to(device).requires_grad_(reward.differentiable)
    first, second = (reward(pictures, [_PROMPT, _PROMPT]) for _ in range(2))
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-4):
        raise RewardError(f"reward {spec!r} gave {first.tolist()}, then {second.tolist()} for the same pictures")
    gradient = None
    if reward.differentiable:
        gradient = float(torch.autograd.grad(first.sum(), pictures)[0].abs().max())
        if not 0 <= gradient < float("inf"):
            raise RewardError(f"reward {spec!r} has a gradient of {gradient}")
    ramp_score, noise_score = second.detach().tolist()
    return {"reward": spec, "ramp": ramp_score, "noise": noise_score, "gradient": gradient}
