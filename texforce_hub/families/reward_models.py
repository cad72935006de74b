"""The published checkpoints of reward models, in their authors' names, and where each parameter lies in ours.

HPSv2 is a whole OpenCLIP model; ImageReward is BLIP's picture encoder and its text encoder with cross-attention, and
five linear layers; the aesthetic predictor is such layers alone.
"""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from texforce_hub.families.original_clip import OPEN_CLIP, from_open_clip

Shape = tuple[int, ...]

_VISUAL: Mapping[str, str] = MappingProxyType(
    {
        "class_embedding": "vision_model.embeddings.class_embedding",
        "positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "ln_post.weight": "vision_model.post_layernorm.weight",
        "ln_post.bias": "vision_model.post_layernorm.bias",
    }
)
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
_OURS = {theirs: ours for ours, theirs in OPEN_CLIP.items()}
_BLIP: Mapping[str, str] = MappingProxyType(
    {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
        "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
        "norm.weight": "post_layernorm.weight",
        "norm.bias": "post_layernorm.bias",
    }
)
_BLIP_BLOCK = re.compile(r"blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)")
_BLIP_LAYERS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_decoder.", "attn_mask")


def from_whole_open_clip(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    """Our names and shapes of what one parameter of an OpenCLIP model holds: q, k and v are parted, projections turned.

    None for one that is not read.
    """
    if name == "logit_scale":
        yield name, shape
    elif name == "visual.proj":
        yield "visual_projection.weight", shape[::-1]
    elif not name.startswith("visual."):
        yield from from_open_clip(name, shape)
    elif (rest := name.removeprefix("visual.")) in _VISUAL:
        yield _VISUAL[rest], shape
    elif match := _BLOCK.fullmatch(rest):
        yield from _vision_block(match[1], match[2], match[3], shape)


def _vision_block(number: str, layer: str, parameter: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    path = f"vision_model.encoder.layers.{number}"
    if layer == "attn.in_proj":
        for which in "qkv":
            yield f"{path}.self_attn.{which}_proj.{parameter}", (shape[0] // 3, *shape[1:])
    elif layer in _OURS:
        yield f"{path}.{_OURS[layer]}.{parameter}", shape


def from_image_reward(name: str) -> str | None:
    """Our name, ``vision.…``, ``text.…`` or ``head.N.…``, of a parameter of ImageReward; ``None``: it is not read."""
    if name.startswith("mlp.layers."):
        return from_linear_layers(name.removeprefix("mlp."))
    if name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
        return "text." + name.removeprefix("blip.text_encoder.")
    rest = name.removeprefix("blip.visual_encoder.")
    if rest in _BLIP:
        return "vision." + _BLIP[rest]
    if match := _BLIP_BLOCK.fullmatch(rest):
        return f"vision.encoder.layers.{match[1]}.{_BLIP_LAYERS.get(match[2], match[2])}.{match[3]}"
    return None


def from_linear_layers(name: str) -> str | None:
    """Our name of a parameter of the five linear layers: numbered without the dropouts between them."""
    match = re.fullmatch(r"layers\.([02467])\.(weight|bias)", name)
    return None if match is None else f"head.{'02467'.index(match[1])}.{match[2]}"


def is_unused(name: str) -> bool:
    """Whether a published checkpoint carries this for its training alone."""
    return name.startswith(_UNUSED) or name.endswith("position_ids")
