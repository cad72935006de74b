"""The networks of learned rewards, built from their configuration and weights; every name must fit."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from texforce_hub.errors import RewardError
from texforce_hub.rewards.preprocess import prepare

HIDDEN = (1024, 128, 64, 16, 1)
"""Widths of the linear layers that score an embedding."""


class Similarity:
    """The cosine of pictures and their prompts under a CLIP model.

    Args:
        model: a ``CLIPModel``.
        tokenizer: gives ``input_ids`` of prompts; they are padded and cut to the model's length.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(requires_grad=False), tokenizer
        self.size = int(model.config.vision_config.image_size)
        self.length = int(model.config.text_config.max_position_embeddings)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines ``(b,)``, float32, of pictures ``(b, 3, h, w)`` in [0, 1]."""
        return (self.embed_images(images) * self.embed_prompts(prompts)).sum(-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors ``(b, d)``, float32, with a gradient to the pictures."""
        pixels = prepare(images, self.size).to(self.model.device, self.model.dtype)
        return F.normalize(self.model.get_image_features(pixels).pooler_output.float(), dim=-1)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors ``(b, d)``, float32."""
        encoded = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        ids = encoded.input_ids.to(self.model.device)
        return F.normalize(self.model.get_text_features(ids).pooler_output.float(), dim=-1)


class LinearLayers(nn.Module):
    """Five linear layers without anything between them, from an embedding ``(b, width)`` to a number ``(b,)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (width, *HIDDEN)
        self.head = nn.ModuleList(nn.Linear(first, second) for first, second in zip(sizes, HIDDEN))

    def forward(self, embeddings: Tensor) -> Tensor:
        """The numbers ``(b,)`` of embeddings ``(b, width)``."""
        for layer in self.head:
            embeddings = layer(embeddings)
        return embeddings[:, 0]


class CrossReward(nn.Module):
    """ImageReward: BLIP's text encoder reads the prompt while it looks at the picture; its first token is scored."""

    mean, std = 0.16717362830052426, 1.0333394966054072
    """Of its scores on the pictures that people ranked."""

    def __init__(self, vision: Any, text: Any) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        self.head = LinearLayers(text.config.hidden_size).head

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores ``(b,)`` of normalised pictures ``(b, 3, s, s)`` and tokens ``(b, n)`` with their mask."""
        seen = self.vision(pixels).last_hidden_state
        read = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            is_decoder=False,  # a decoder would read the prompt with a causal mask, which changes every score
        ).last_hidden_state
        numbers: Tensor = read[:, 0].float()
        for layer in self.head:
            numbers = layer(numbers)
        return (numbers[:, 0] - self.mean) / self.std


def fill(model: nn.Module, state: Mapping[str, Tensor], *, ignored: Iterable[str] = (), name: str) -> nn.Module:
    """Put all of a state into a model that has no weights of its own yet.

    Raises:
        RewardError: a name that one of the two lacks, or another shape; the first is named.
    """
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in state.items() if key not in set(ignored)}
    for key in sorted(own.keys() ^ given.keys()) or [key for key in own if own[key] != given[key]]:
        raise RewardError(
            f"reward {name!r}: its weights do not fit: {key} is {given.get(key, 'missing')} in the file, "
            f"{own.get(key, 'not there')} in the model; download them again"
        )
    model.load_state_dict({key: state[key].float() for key in own})
    return model
