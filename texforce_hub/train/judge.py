"""What pictures are worth: rewards, and how much better than its group each picture is."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from texforce_hub.rewards.reward import Reward, score_images
from texforce_hub.train.config import TrainConfig

_ROUNDING = 1e-5  # a group whose rewards differ by less than this share of their size does not differ


@dataclass
class Judge:
    """The rewards of a run; it remembers the scores of the rollout last judged.

    Shapes:
        scores: ``(rewards, b)``
    """

    rewards: Sequence[Reward]
    config: TrainConfig
    scores: Tensor = field(default_factory=lambda: torch.empty(0))

    def advantages(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """``(b,)``, pictures grouped prompt by prompt.

        Raises:
            RewardError: a reward cannot be used; the message names the prompt.
        """
        self.scores = score_images(self.rewards, images, texts, batch=self.config.batch_size)
        return self.compare(self.scores)

    def compare(self, scores: Tensor, *, images: int | None = None, only: int | None = None) -> Tensor:
        """The advantages ``(b,)`` of scores ``(rewards, b)``, in groups of ``images``; by one reward ``only``."""
        config, groups = self.config, scores.view(len(scores), -1, images or self.config.images_per_prompt)
        weights = [reward.weight if only in (None, i) else 0.0 for i, reward in enumerate(self.rewards)]
        floor, clip = config.advantage_floor, config.advantage_clip
        return group_advantages(groups, weights, floor=floor, clip=clip, one_out=config.leave_one_out).flatten()

    def total(self, scores: Tensor) -> Tensor:
        """The weighted sum of the rewards, ``(b,)``."""
        return torch.stack([r.weight * row for r, row in zip(self.rewards, scores, strict=True)]).sum(0)

    def ascend(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """The gradient of the weighted sum at the images, of their shape, for rewards that are differentiable."""
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            rows = torch.stack([reward(leaf, texts) for reward in self.rewards])
            (gradient,) = torch.autograd.grad(self.total(rows).sum(), leaf)
        self.scores = rows.detach()
        return gradient

    @property
    def flat_groups(self) -> int:
        """Prompts whose pictures all got the same: they taught nothing."""
        groups = self.total(self.scores).view(-1, self.config.images_per_prompt)
        return int(_flat(groups).sum())


def group_advantages(
    rewards: Tensor, weights: Sequence[float], *, floor: float, clip: float, one_out: bool = False
) -> Tensor:
    """How much better than its group a picture is: rewards on any scale count as their weights say.

    Each reward is standardised in the group, the results are summed by weight, and the sum is divided by its own
    deviation plus ``floor``, which damps groups whose rewards contradict each other. ``one_out`` compares with the
    mean of the others in the group instead of that of all.

    Shapes:
        rewards: ``(rewards, prompts, images)``; the result is ``(prompts, images)``, in [-clip, clip]. A group of
        equal rewards gives exactly 0.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    standard = torch.where(_flat(rewards), 0.0, centred / rewards.std(-1, keepdim=True))
    share = torch.tensor(weights, device=rewards.device).view(-1, 1, 1) / sum(map(abs, weights))
    mixture = (share * standard).sum(0)
    if one_out:
        mixture = mixture * rewards.shape[-1] / (rewards.shape[-1] - 1)
    deviation = mixture.std(-1, keepdim=True) + floor
    return (mixture / deviation.clamp(min=1e-12)).clamp(-clip, clip)


def _flat(groups: Tensor) -> Tensor:
    """Whether a group's rewards ``(…, images)`` are equal up to rounding, ``(…, 1)``."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    return high - low <= _ROUNDING * groups.abs().amax(-1, keepdim=True)
