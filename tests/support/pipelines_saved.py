"""Pipelines and tuned U-Nets on the disk as trainers leave them, and what they compute."""

import functools
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from tests.support.pipelines_tiny import tiny_clip, tiny_pipeline
from texforce_hub.files.writing import write_tensors
from texforce_hub.pipelines.load import load_pipeline


def text_out(pipe, part="text_encoder"):
    with torch.no_grad():
        return getattr(pipe, part)(torch.arange(16).unsqueeze(0) * 3 % 52)[0]


def unet_out(unet, cross=32, latents=4):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, latents, 8, 8, generator=generator)
    e = torch.randn(1, 16, cross, generator=generator)
    extra = {}
    if unet.config.addition_embed_type:
        extra["added_cond_kwargs"] = {"text_embeds": torch.ones(1, 40), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        return unet(x, 10, e, **extra).sample


@functools.cache
def saved(tmp, family="sd1"):
    folder = tmp / family
    tiny_pipeline(family).save_pretrained(folder)
    return folder


def load(base, **options):
    return load_pipeline(base, device="cpu", **options)


def original_topology(family):
    """A tiny pipeline whose U-Net and VAE have the block structure of the original checkpoints."""
    pipe = tiny_pipeline(family)
    torch.manual_seed(1)
    channels: tuple[int, ...]
    cross: dict[str, Any] = {"down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)}
    cross["up_block_types"] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    channels = (32, 32, 64, 64)
    config = dict(pipe.unet.config)
    if family == "sdxl":
        cross = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")}
        cross["up_block_types"] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
        channels = (32, 32, 64)
    unet = UNet2DConditionModel.from_config({**config, **cross, "block_out_channels": channels, "layers_per_block": 2})
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
    )
    if family == "sd2":  # OpenCLIP's heads are 64 wide, and the library counts on it
        pipe.register_modules(text_encoder=tiny_clip(width=48, act="gelu"))
    pipe.register_modules(unet=unet.eval(), vae=vae.eval())
    return pipe


def tuned_unet(seed=9):
    pipe = tiny_pipeline("sd1")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return pipe.unet


def write_tuned_unet(kind, folder):
    """A tuned U-Net as a trainer leaves it; gives what ``unet=`` takes and the U-Net that is meant."""
    unet = tuned_unet()
    if kind == "pipeline":
        pipe = tiny_pipeline("sd1")
        pipe.register_modules(unet=unet)
        pipe.save_pretrained(folder)
    elif kind == "checkpoint folder":
        unet.save_pretrained(folder / "unet")
        (folder / "optimizer.bin").write_bytes(b"x")
    elif kind == "old pickle":
        unet.save_pretrained(folder / "unet", safe_serialization=False)
    elif kind == "ema":
        unet.save_pretrained(folder / "unet_ema")
    elif kind == "repository root":
        unet.save_pretrained(folder)
    elif kind == "bare state dict":
        write_tensors(folder / "lightning_4step_unet.safetensors", unet.state_dict())
        return folder / "lightning_4step_unet.safetensors", unet
    elif kind == "bare in a folder":
        write_tensors(folder / "lightning_4step_unet.safetensors", unet.state_dict())
    elif kind == "fp16 files":
        unet.to(torch.float16).save_pretrained(folder / "unet", variant="fp16")
        unet.float()
    return folder, unet
