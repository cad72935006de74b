"""The CLIP models that rewards are made of, as OpenAI and OpenCLIP published them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from texforce_hub.errors import RewardError
from texforce_hub.families.reward_models import from_whole_open_clip, is_unused
from texforce_hub.reading import read_json
from texforce_hub.rewards.networks import Similarity, fill
from texforce_hub.rewards.weights import Published, find_file, load_state

_OPENAI = "MIT"
LARGE = Published(
    "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", "model.safetensors", _OPENAI
)
SMALL = Published(
    "openai/clip-vit-base-patch32", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268", "pytorch_model.bin", _OPENAI
)
VIT_H = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
        "hidden_act": "gelu", "projection_dim": 1024,
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32,
        "hidden_act": "gelu", "patch_size": 14, "projection_dim": 1024,
    },
}  # fmt: skip
"""OpenCLIP's ViT-H-14, as ``CLIPConfig`` says it."""


def beside(published: Published, file: str) -> Published:
    """Another file of the same repository and commit."""
    return Published(published.repo, published.revision, file, published.licence)


def load_clip(published: Published, folder: Path | None, device: torch.device, *, name: str) -> Similarity:
    """A CLIP model that is published in the layout of ``transformers``.

    Raises:
        RewardError: a file is not there, or does not fit.
    """
    config = read_json(find_file(beside(published, "config.json"), folder), error=RewardError)
    state = load_state(find_file(published, folder))
    return make_similarity(config, state, find_tokenizer(folder), device, name=name)


def make_similarity(
    config: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: Any, device: torch.device, *, name: str
) -> Similarity:
    """A similarity by a model of this configuration and these weights; half precision on a GPU."""
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig.from_dict(dict(config)))
    fill(model, {key: tensor for key, tensor in state.items() if not is_unused(key)}, name=name)
    return Similarity(model.to(device, torch.float16 if device.type == "cuda" else torch.float32), tokenizer)


def convert_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An OpenCLIP model's weights under the names of ``transformers``.

    Raises:
        RewardError: a parameter that has no place there.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        places = [key for key, _ in from_whole_open_clip(name, tuple(tensor.shape))]
        if not places and not is_unused(name):
            raise RewardError(f"{name} is no parameter of an OpenCLIP model")
        parts = (
            tensor.chunk(len(places))
            if len(places) > 1
            else [tensor.T if name.endswith(("proj", "projection")) else tensor]
        )
        converted |= dict(zip(places, parts))
    return converted


def find_tokenizer(folder: Path | None) -> Any:
    """CLIP's tokenizer, which all of its models share: in the folder, else OpenAI's.

    Raises:
        RewardError: it is not there.
    """
    from transformers import CLIPTokenizer

    own = folder if folder is not None and folder.is_dir() and (folder / "vocab.json").is_file() else None
    paths = [find_file(beside(LARGE, file), own) for file in ("vocab.json", "merges.txt")]
    return CLIPTokenizer.from_pretrained(paths[0].parent)
