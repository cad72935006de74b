"""HPSv2 and v2.1 (arXiv 2306.09341): OpenCLIP's ViT-H tuned on which pictures of a prompt people preferred."""

from pathlib import Path

import torch

from texforce_hub.rewards.clip import VIT_H, convert_open_clip, find_tokenizer, make_similarity
from texforce_hub.rewards.functions import Score
from texforce_hub.rewards.weights import Published, find_file, load_state, say_licence

_COMMIT = "697403c78157020a1ae59d23f111aa58ced35b0a"
PUBLISHED = {
    "v2": Published("xswu/HPSv2", _COMMIT, "HPS_v2_compressed.pt", "Apache-2.0"),
    "v2.1": Published("xswu/HPSv2", _COMMIT, "HPS_v2.1_compressed.pt", "Apache-2.0"),
}


def hpsv2(device: torch.device, folder: Path | None = None, variant: str = "v2") -> Score:
    """The cosine, some .15 to .35; scores of the two versions cannot be compared. Differentiable.

    Raises:
        RewardError: the weights are not there, or do not fit.
    """
    published = PUBLISHED[variant]
    state = convert_open_clip(load_state(find_file(published, folder)))
    say_licence(f"hpsv2 {variant}", published)
    return make_similarity(VIT_H, state, find_tokenizer(folder), device, name=f"hpsv2 {variant}")
