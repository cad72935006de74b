"""SD1's, SD2's and SDXL's parts in true size on the meta device, through whichever libraries are installed."""

from types import MappingProxyType
from typing import Any

import torch

FAMILIES = ("sd1", "sd2", "sdxl")
TOWERS = MappingProxyType(
    {
        "sd1": {"text_encoder": "clip_l"},
        "sd2": {"text_encoder": "clip_h"},
        "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    }
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
MLP = ("fc1", "fc2")
UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET_LAYERS = (
    *UNET_ATTENTION,
    *("proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "ff.net.0.proj", "ff.net.2", "time_emb_proj"),
)

_CLIP = {"clip_l": (768, 12, 12, 768), "clip_h": (1024, 23, 16, 512), "clip_g": (1280, 32, 20, 1280)}
_LINEAR = {"use_linear_projection": True}
_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], **_LINEAR},
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        **_LINEAR,
    },
}


def make_tower(kind: str, **config: Any) -> Any:
    """A CLIP text encoder: ``clip_l``, ``clip_h`` or, with its projection, ``clip_g``."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    width, layers, heads, projected = _CLIP[kind]
    config |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    model = CLIPTextModelWithProjection if kind == "clip_g" else CLIPTextModel
    with torch.device("meta"):
        return model(CLIPTextConfig(intermediate_size=4 * width, projection_dim=projected, **config))


def make_towers(family: str, **config: Any) -> dict[str, Any]:
    """A family's text encoders by part."""
    return {part: make_tower(kind, **config) for part, kind in TOWERS[family].items()}


def make_unet(family: str) -> Any:
    """A family's U-Net in the installed ``diffusers``."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, **_UNETS[family])


def without_time(unet: Any) -> torch.nn.Module:
    """A U-Net's blocks alone: some trainers name a layer outside of them twice."""
    blocks = torch.nn.Module()
    blocks.down_blocks, blocks.mid_block, blocks.up_blocks = unet.down_blocks, unet.mid_block, unet.up_blocks
    return blocks


def make_t5() -> Any:
    """T5-XXL's encoder, the third one of SD3 and the second of Flux."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(d_model=4096, num_layers=24, d_kv=64, num_heads=64, d_ff=10240, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        return T5EncoderModel(config)
