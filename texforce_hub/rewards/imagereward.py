"""ImageReward (arXiv 2304.05977): BLIP trained on how people ranked the pictures of a prompt; about normal, mean 0."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from texforce_hub.errors import RewardError
from texforce_hub.families.reward_models import from_image_reward, is_unused
from texforce_hub.rewards.functions import Score
from texforce_hub.rewards.networks import CrossReward, fill
from texforce_hub.rewards.preprocess import prepare
from texforce_hub.rewards.weights import Published, find_file, load_state, say_licence

PUBLISHED = Published("zai-org/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72", "ImageReward.pt", "Apache-2.0")
VOCABULARY = Published(
    "google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594", "vocab.txt", "Apache-2.0"
)
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
VISION |= {"patch_size": 16, "image_size": 224}
TEXT = {"hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 12}
TEXT |= {"num_hidden_layers": 12, "vocab_size": 30524, "max_position_embeddings": 512}
_TOKENS = 35


def imagereward(device: torch.device, folder: Path | None = None) -> Score:
    """The published score; its authors' four pictures have .58, .27, -1.41 and -2.03. Differentiable.

    Raises:
        RewardError: the weights are not there, or do not fit.
    """
    from transformers import BertTokenizer

    model = make_model(load_state(find_file(PUBLISHED, folder)), VISION, TEXT)
    own = folder if folder is not None and folder.is_dir() and (folder / VOCABULARY.file).is_file() else None
    tokenizer = BertTokenizer.from_pretrained(find_file(VOCABULARY, own).parent)
    say_licence("imagereward", PUBLISHED)
    return make_score(model.to(device), tokenizer)


def make_model(state: Mapping[str, Tensor], vision: Mapping[str, Any], text: Mapping[str, Any]) -> CrossReward:
    """The network of these sizes from the published file's tensors.

    Raises:
        RewardError: a parameter that the network does not have, or lacks.
    """
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    model = CrossReward(
        BlipVisionModel(BlipVisionConfig(**vision, layer_norm_eps=1e-6)),
        BlipTextModel(BlipTextConfig(**text, is_decoder=True), add_pooling_layer=False),
    )
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = from_image_reward(name)
        if ours is None and not is_unused(name):
            raise RewardError(
                f"reward 'imagereward': {name} is no parameter of its network; download its weights again"
            )
        renamed |= {} if ours is None else {ours: tensor}
    fill(model, renamed, name="imagereward")
    return model.eval().requires_grad_(requires_grad=False)


def make_score(model: CrossReward, tokenizer: Any) -> Score:
    """The score by a network and BERT's tokenizer."""
    size = int(model.vision.config.image_size)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        said = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt")
        ids, mask = said.input_ids.to(images.device), said.attention_mask.to(images.device)
        numbers: Tensor = model(prepare(images, size), ids, mask)
        return numbers

    return score
