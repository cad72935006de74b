"""What ``save_lora_weights`` of ``diffusers`` 0.30 and of today writes, and today's converter to kohya's names."""

import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.keys.foreign.listing import Listing, versions
from tests.keys.foreign.models import ATTENTION, FAMILIES, MLP, UNET_ATTENTION, UNET_LAYERS, make_towers, make_unet

Halves = Mapping[str, Tensor]


def write_today() -> Iterator[Listing]:
    """Today's spelling, today's mixture with an older one, kohya's by conversion, and the U-Net's bare names."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
    from diffusers.utils.state_dict_utils import convert_all_state_dict_to_peft

    source = versions("peft", "diffusers", "transformers")
    for family in FAMILIES:
        halves = _train(family, text=(*ATTENTION, *MLP), unet=UNET_LAYERS)
        saved = _save(family, halves)
        yield Listing(f"diffusers-{family}", f"save_lora_weights: {source}", saved)
        older = halves | {"unet": convert_state_dict_to_diffusers(dict(halves["unet"]))}
        how = "save_lora_weights, the U-Net through convert_state_dict_to_diffusers as training scripts do"
        yield Listing(f"mixed-{family}", f"{how}: {source}", _save(family, older))
        flat = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(dict(saved)))
        how = "convert_state_dict_to_kohya(convert_all_state_dict_to_peft(saved file))"
        yield Listing(f"kohya-by-diffusers-{family}", f"{how}: {source}", flat)
        how = "get_peft_model_state_dict of the U-Net, as its save_lora_adapter writes"
        yield Listing(f"bare-unet-{family}", f"{how}: {source}", halves["unet"])


def write_layers() -> Iterator[Listing]:
    """0.21 to 0.34: every part through ``convert_state_dict_to_diffusers``, as the training scripts did."""
    from diffusers.utils import convert_state_dict_to_diffusers

    source = versions("diffusers", "peft", "transformers")
    for family in FAMILIES:
        halves = _train(family, text=ATTENTION, unet=UNET_ATTENTION)
        converted = {part: convert_state_dict_to_diffusers(dict(tensors)) for part, tensors in halves.items()}
        how = "save_lora_weights of parts through convert_state_dict_to_diffusers"
        yield Listing(f"diffusers-layers-{family}", f"{how}: {source}", _save(family, converted))


def _train(family: str, *, text: tuple[str, ...], unet: tuple[str, ...]) -> dict[str, Halves]:
    """The untrained halves of every part, by PEFT's names."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    parts = make_towers(family) | {"unet": make_unet(family)}
    halves: dict[str, Halves] = {}
    for part, module in parts.items():
        config = LoraConfig(r=4, lora_alpha=4, target_modules=list(unet if part == "unet" else text))
        with torch.device("meta"):
            inject_adapter_in_model(config, module)
        halves[part] = get_peft_model_state_dict(module)
    return halves


def _save(family: str, halves: Mapping[str, Halves]) -> dict[str, Tensor]:
    import diffusers

    pipeline = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    saved: dict[str, Tensor] = {}

    def keep(tensors: Halves, path: Any) -> None:
        saved.update(tensors)

    with tempfile.TemporaryDirectory() as folder:
        layers = {f"{part}_lora_layers": tensors for part, tensors in halves.items()}
        pipeline.save_lora_weights(folder, **layers, save_function=keep)
    return saved
