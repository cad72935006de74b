"""Weights, pictures and tokens by a recipe, so that golden scores need no files of weights."""

import math
import zlib

import torch


def wave(name, shape, scale=1.0, offset=0.0):
    """``offset ± scale`` in a shape, float32: the lower digits of a sine, which the name gives its phase."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    digits = torch.sin(steps * 12.9898 + zlib.crc32(name.encode()) % 1000) * 43758.5453
    return (offset + scale * (2 * (digits - digits.floor()) - 1)).float().reshape(shape)


def weight(name, shape):
    """A parameter of a size that keeps activations in range, whatever its layer."""
    if len(shape) < 2 or name.endswith("class_embedding"):
        return wave(name, shape, 0.1, 1.0 if name.endswith("weight") else 0.0)
    return wave(name, shape, 1.5 / math.sqrt(math.prod(shape[1:])))


def pictures(count=3, height=48, width=40):
    """Pictures ``(count, height, width, 3)``, bytes."""
    waves = [wave(f"picture {n}", (height, width, 3), 0.5, 0.5) for n in range(count)]
    ramp = torch.linspace(0, 1, height)[:, None, None]
    return torch.stack([(255 * (0.6 * w + 0.4 * ramp)).round().byte() for w in waves])


PROMPTS = ["a green rabbit", "four wolves in the forest, at night", "A photo of a hand!"]
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
BLIP_VISION = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
BERT = {
    "vocab_size": 60, "hidden_size": 32, "encoder_width": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 40, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "add_cross_attention": True, "fusion_layer": 0,
    "type_vocab_size": 2, "pad_token_id": 0, "position_embedding_type": "absolute",
}  # fmt: skip
TOKENS = [[1, 5, 9, 14, 2, 0, 0, 0], [1, 7, 8, 30, 31, 32, 2, 0], [1, 44, 3, 2, 0, 0, 0, 0]]
