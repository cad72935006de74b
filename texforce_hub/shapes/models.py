"""The parts of the shapes pipeline, untrained: a true Stable Diffusion, only small.

Tokenizer (byte-level BPE, every word of the language is one token), CLIP text encoder (0.4 M parameters),
VAE (8 latent channels, 8 × 8), U-Net with cross-attention (2.2 M) and DDIM with Stable Diffusion's betas.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from texforce_hub.shapes.render import SIZE

TOKENS = 16  # a prompt's length, start and end included
WIDTH = 96  # of the text encoder, and so of the U-Net's cross-attention
LATENT_CHANNELS = 8
_MERGES = Path(__file__).with_name("merges.txt")


def make_tokenizer() -> Any:
    """A CLIP tokenizer for the language: byte-level alphabet, one token for every word it knows.

    The byte-pair merges were found once, from the vocabulary, and are kept in ``merges.txt``: the trainer
    breaks ties by the order of a hash table, which differs from process to process.
    """
    merges = [tuple(line.split()) for line in _MERGES.read_text(encoding="utf-8").splitlines()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries: dict[str, int] = {}
    for symbol in [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]:
        entries.setdefault(symbol, len(entries))
    for mark in ("<|startoftext|>", "<|endoftext|>"):
        entries[mark] = len(entries)
    return CLIPTokenizer(vocab=entries, merges=merges, model_max_length=TOKENS)


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token ids ``(len(prompts), TOKENS)``, padded with the end mark as Stable Diffusion does."""
    batch = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    ids: Tensor = batch.input_ids
    return ids


def make_text_encoder(tokenizer: Any) -> Any:
    """A CLIP text encoder of three layers, random weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="quick_gelu",
    )
    return CLIPTextModel(config)


class PictureTower(nn.Module):
    """The small convolutional half of the contrastive training; not shipped."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer, stride in ((3, 24, 2), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1)):
            layers += [nn.Conv2d(inner, outer, 3, stride, 1), nn.GroupNorm(8, outer), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * (SIZE // 8) ** 2, WIDTH))

    def forward(self, pictures: Tensor) -> Tensor:
        """``(b, 3, 32, 32)`` in [-1, 1] → ``(b, WIDTH)``."""
        features: Tensor = self.body(pictures)
        return features


def make_vae() -> Any:
    """A VAE that starts close to the identity: residual branches at zero, little posterior noise."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(12, 24, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=SIZE,
    )
    with torch.no_grad():
        vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
        vae.quant_conv.bias[LATENT_CHANNELS:] = -5.0
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            _zero(module)
        elif isinstance(module, nn.Conv2d) and "quant" not in name:
            nn.init.orthogonal_(module.weight.view(module.weight.shape[0], -1))
    return vae


def make_unet() -> Any:
    """A U-Net with cross-attention at 4 × 4 and in the middle; it starts by predicting zero."""
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers' old naming: the number of heads
        norm_num_groups=8,
    )
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out")) or name == "conv_out":
            _zero(module)
    return unet


def make_scheduler() -> Any:
    """DDIM as Stable Diffusion 1.5 configures it."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
