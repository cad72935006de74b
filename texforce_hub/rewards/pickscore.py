"""PickScore (arXiv 2305.01569): a CLIP model tuned on which of two pictures people picked for a prompt."""

from pathlib import Path

import torch

from texforce_hub.rewards.clip import load_clip
from texforce_hub.rewards.functions import Score
from texforce_hub.rewards.weights import Published, say_licence

_COMMIT = "a4e4367c6dfa7288a00c550414478f865b875800"
PUBLISHED = Published(
    "yuvalkirstain/PickScore_v1", _COMMIT, "model.safetensors", "MIT (its code; the card of its weights names none)"
)


def pickscore(device: torch.device, folder: Path | None = None) -> Score:
    """The cosine, some .17 to .24; the paper's score is 100 times that. Differentiable.

    Raises:
        RewardError: the weights are not there.
    """
    similarity = load_clip(PUBLISHED, folder, device, name="pickscore")
    say_licence("pickscore", PUBLISHED)
    return similarity
