"""How bright a picture is: easy to raise, easy to see, good for trying things out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from texforce_hub.rewards.functions import Score


def brightness(device: torch.device) -> Score:
    """The mean of all pixels and channels, in [0, 1], differentiable; prompts are ignored."""
    del device

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        del prompts
        return images.float().mean((1, 2, 3))

    return score
