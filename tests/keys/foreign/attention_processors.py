"""LoRA inside attention processors: ``diffusers`` 0.16, 0.17 and 0.20."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.keys.foreign.listing import Listing, versions
from tests.keys.foreign.models import ATTENTION, FAMILIES, make_towers, make_unet


def write_016() -> Iterator[Listing]:
    """``save_attn_procs``' bare U-Net, and ``save_lora_weights`` with a processor for each text projection."""
    source = versions("diffusers", "transformers")
    for family in ("sd1", "sd2"):
        unet = _unet_halves(family)
        how = "AttnProcsLayers(unet.attn_processors).state_dict(), as save_attn_procs writes"
        yield Listing(f"attention-processors-bare-{family}", f"{how}: {source}", unet)
        parts = {"unet": unet} | _text_halves(family, ATTENTION)
        how = "save_lora_weights of U-Net and text encoder, as its DreamBooth script does"
        yield Listing(f"attention-processors-016-{family}", f"{how}: {source}", _prefix(parts))


def write_017() -> Iterator[Listing]:
    """One processor for each self-attention of the text encoder."""
    source = versions("diffusers", "transformers")
    for family in ("sd1", "sd2"):
        parts = {"unet": _unet_halves(family)} | _text_halves(family, ("self_attn",))
        how = "save_lora_weights of U-Net and text encoder, as its DreamBooth script does"
        yield Listing(f"attention-processors-017-{family}", f"{how}: {source}", _prefix(parts))


def write_020() -> Iterator[Listing]:
    """SDXL, which came with 0.18. By then the text encoders' halves had moved out of their processors."""
    from diffusers.loaders import LoraLoaderMixin, text_encoder_lora_state_dict

    source = versions("diffusers", "transformers")
    for family in FAMILIES:
        parts = {"unet": _unet_halves(family)}
        if family == "sdxl":
            how = "AttnProcsLayers(unet.attn_processors).state_dict(), as save_attn_procs writes"
            yield Listing("attention-processors-bare-sdxl", f"{how}: {source}", parts["unet"])
            how = "save_lora_weights as its SDXL script does, of the U-Net alone"
            yield Listing("attention-processors-020-sdxl", f"{how}: {source}", _prefix(parts))
        for part, tower in make_towers(family).items():
            with torch.device("meta"):
                LoraLoaderMixin._modify_text_encoder(tower, dtype=torch.float32)
            parts[part] = text_encoder_lora_state_dict(tower)
        how = "save_lora_weights as its scripts do with --train_text_encoder"
        yield Listing(f"mixed-020-{family}", f"{how}: {source}", _prefix(parts))


def _unet_halves(family: str) -> dict[str, Tensor]:
    from diffusers.loaders import AttnProcsLayers
    from diffusers.models.attention_processor import LoRAAttnProcessor

    unet = make_unet(family)
    with torch.device("meta"):
        processors = {
            name: LoRAAttnProcessor(hidden_size=_width(unet, name), cross_attention_dim=_context(unet, name), rank=4)
            for name in unet.attn_processors
        }
        unet.set_attn_processor(processors)
        return dict(AttnProcsLayers(unet.attn_processors).state_dict())


def _width(unet: Any, name: str) -> int:
    """The channels of an attention's block, as every training script worked them out."""
    channels: list[int] = list(unet.config.block_out_channels)
    if name.startswith("mid_block"):
        return channels[-1]
    return (channels[::-1] if name.startswith("up_blocks") else channels)[int(name.split(".")[1])]


def _context(unet: Any, name: str) -> int | None:
    return None if name.endswith("attn1.processor") else int(unet.config.cross_attention_dim)


def _text_halves(family: str, attended: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Processors for the modules that a library of that time gave one."""
    from diffusers.loaders import AttnProcsLayers
    from diffusers.models.attention_processor import LoRAAttnProcessor

    halves = {}
    for part, tower in make_towers(family).items():
        width = tower.config.hidden_size
        with torch.device("meta"):
            processors = {
                name: LoRAAttnProcessor(hidden_size=width, cross_attention_dim=None, rank=4)
                for name, _ in tower.named_modules()
                if name.endswith(attended)
            }
            halves[part] = dict(AttnProcsLayers(processors).state_dict())
    return halves


def _prefix(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
