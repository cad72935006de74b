"""LAION's aesthetic predictor v2: five linear layers on CLIP's embedding of a picture, about 1 to 10."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from texforce_hub.errors import RewardError
from texforce_hub.families.reward_models import from_linear_layers
from texforce_hub.rewards.clip import LARGE, load_clip
from texforce_hub.rewards.functions import Score
from texforce_hub.rewards.networks import LinearLayers, Similarity, fill
from texforce_hub.rewards.weights import load_state

logger = logging.getLogger("texforce_hub")

FILE = "sac+logos+ava1-l14-linearMSE.pth"
_ADDRESS = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)


def aesthetic(device: torch.device, folder: Path | None = None) -> Score:
    """How much people would like the picture, whatever the prompt; differentiable.

    Raises:
        RewardError: the weights are not there, or do not fit.
    """
    path = folder / FILE if folder is not None and folder.is_dir() else folder
    if path is None or not path.is_file():
        raise RewardError(
            f"reward 'aesthetic' needs {FILE}, which is not on the Hub: get {_ADDRESS}, give aesthetic:FILE"
        )
    head = make_head(load_state(path)).to(device)
    clip = path.parent if (path.parent / LARGE.file).is_file() else None
    similarity = load_clip(LARGE, clip, device, name="aesthetic")
    logger.info("reward aesthetic: layers by C. Schuhmann, licence Apache-2.0 (its code); CLIP by OpenAI, MIT")
    return make_score(similarity, head)


def make_head(state: Mapping[str, Tensor]) -> LinearLayers:
    """The layers from the published file's tensors."""
    renamed = {from_linear_layers(name) or name: tensor for name, tensor in state.items()}
    head = LinearLayers(int(state["layers.0.weight"].shape[1]) if "layers.0.weight" in state else 768)
    fill(head, renamed, name="aesthetic")
    return head.eval().requires_grad_(requires_grad=False)


def make_score(similarity: Similarity, head: LinearLayers) -> Score:
    """The score of pictures by their embedding."""

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        del prompts
        numbers: Tensor = head(similarity.embed_images(images))
        return numbers

    return score
