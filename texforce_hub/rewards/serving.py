"""Rewards of this process as a server gives them: arrays in, arrays out."""

from collections.abc import Sequence

import torch

from texforce_hub.rewards.functions import ArrayScore
from texforce_hub.rewards.reward import Reward
from texforce_hub.rewards.wire import Pixels


def as_arrays(reward: Reward, device: str | torch.device = "cpu") -> ArrayScore:
    """A reward's scores of arrays, computed on a device; its weight does not count.

    Raises:
        RewardError: on a call, as the reward does.
    """

    @torch.no_grad()
    def score(images: Pixels, prompts: Sequence[str]) -> Pixels:
        numbers: Pixels = reward(torch.from_numpy(images).to(device), prompts).cpu().numpy()
        return numbers

    return score
