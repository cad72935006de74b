"""CLIPScore (arXiv 2104.08718): how well CLIP thinks that a picture and its prompt belong together."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from texforce_hub.rewards.clip import LARGE, SMALL, load_clip
from texforce_hub.rewards.functions import Score
from texforce_hub.rewards.networks import Similarity
from texforce_hub.rewards.weights import say_licence

_SCALE = 2.5  # the paper's, which spreads the cosines of pictures over [0, 1]
PUBLISHED = {"b32": SMALL, "l14": LARGE}


def clipscore(device: torch.device, folder: Path | None = None, variant: str = "b32") -> Score:
    """``2.5 · max(cosine, 0)`` of ViT-B/32, the paper's, or ViT-L/14; differentiable.

    Raises:
        RewardError: the weights are not there.
    """
    similarity = load_clip(PUBLISHED[variant], folder, device, name="clipscore")
    say_licence("clipscore", PUBLISHED[variant])
    return make_score(similarity)


def make_score(similarity: Similarity) -> Score:
    """The score by a similarity."""

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return _SCALE * similarity(images, prompts).clamp_min(0)

    return score
