"""Does a picture of the shapes world show what its prompt says? Colour, shape and place, from the pixels."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from texforce_hub.rewards.functions import Score
from texforce_hub.shapes.grammar import parse
from texforce_hub.shapes.reward import score_scenes

_parse = lru_cache(maxsize=65536)(parse)


def alignment(device: torch.device) -> Score:
    """Scores in [0, 1], differentiable; noisy words are taken as they should be meant.

    Raises:
        PromptError: on a call, if a prompt is no sentence of the shapes world.
    """
    del device  # nothing is loaded; the work is done where the pictures are

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return score_scenes(images, [_parse(prompt) for prompt in prompts])

    return score
