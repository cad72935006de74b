"""PEFT's folders and state dicts, by an installed PEFT of any age."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tests.keys.foreign.listing import Listing, versions
from tests.keys.foreign.models import ATTENTION, FAMILIES, MLP, UNET_ATTENTION, UNET_LAYERS, make_tower, make_unet

_FOLDERS = {"sd1": "clip_l", "sd2": "clip_h", "sdxl-te1": "clip_l", "sdxl-te2": "clip_g"}
_CACHE = "../huggingface/hub/models--"
_RELEASED = {
    "sd1": f"{_CACHE}CompVis--stable-diffusion-v1-4/snapshots/133a221b/text_encoder",
    "sd2": f"{_CACHE}stabilityai--stable-diffusion-2-1-base/snapshots/5ede9e4b/text_encoder",
    "sdxl-te1": f"{_CACHE}stabilityai--stable-diffusion-xl-base-1.0/snapshots/46216598/text_encoder",
    "sdxl-te2": f"{_CACHE}stabilityai--stable-diffusion-xl-base-1.0/snapshots/46216598/text_encoder_2",
}
"""The unusable paths that released folders call their base by."""


def write_folders() -> Iterator[Listing]:
    """Text encoders and U-Nets with patterns of ranks and alphas, the raw state dicts, LoHa and LoKr."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    source = versions("peft", "transformers")
    for size, kind in _FOLDERS.items():
        patterns = {"rank_pattern": {"fc1": 8}, "alpha_pattern": {"fc1": 4}, "use_rslora": size == "sd2"}
        config = LoraConfig(r=16, lora_alpha=8, target_modules=[*ATTENTION, *MLP], **patterns)
        model, halves = _wrap(make_tower(kind), config)
        yield _folder(f"peft-{size}", source, halves, config)
        raw = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
        yield Listing(f"state-dict-{size}", f"PeftModel.state_dict(), LoRA tensors only: {source}", raw)
        for make in (LoHaConfig, LoKrConfig):
            product = make(r=8, alpha=8, target_modules=list(ATTENTION))
            _, tensors = _wrap(make_tower(kind), product)
            yield _folder(f"peft-{product.peft_type.value.lower()}-{size}", source, tensors, product)
    yield from _unet_folders(versions("peft", "diffusers"))


def _unet_folders(source: str) -> Iterator[Listing]:
    from peft import LoraConfig

    for family in FAMILIES:
        config = LoraConfig(r=4, lora_alpha=4, target_modules=list(UNET_LAYERS))
        _, halves = _wrap(make_unet(family), config)
        yield _folder(f"peft-unet-{family}", source, halves, config)


def write_old_folders() -> Iterator[Listing]:
    """As TexForce released them, with PEFT 0.4."""
    from peft import LoraConfig

    source = versions("peft", "transformers")
    for size, base in _RELEASED.items():
        config = LoraConfig(r=16, lora_alpha=16, target_modules=list(ATTENTION), base_model_name_or_path=base)
        _, halves = _wrap(make_tower(_FOLDERS[size]), config)
        yield _folder(f"peft-old-{size}", source, halves, config, base)


def write_old_unets() -> Iterator[Listing]:
    """The U-Nets of that time's training scripts, with PEFT 0.4 too."""
    from peft import LoraConfig

    for family in FAMILIES:
        config = LoraConfig(r=4, lora_alpha=4, target_modules=list(UNET_ATTENTION))
        _, halves = _wrap(make_unet(family), config)
        yield _folder(f"peft-old-unet-{family}", versions("peft", "diffusers"), halves, config)


def _wrap(module: Any, config: Any) -> tuple[Any, Mapping[str, torch.Tensor]]:
    from peft import get_peft_model, get_peft_model_state_dict

    with torch.device("meta"):
        model = get_peft_model(module, config)
    return model, get_peft_model_state_dict(model)


def _folder(
    name: str, source: str, tensors: Mapping[str, torch.Tensor], config: Any, base: str | None = None
) -> Listing:
    """The folder's two files in one listing."""
    stored = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    stored = json.loads(json.dumps(stored, default=str))
    stored |= {"peft_type": config.peft_type.value, "base_model_name_or_path": base}
    return Listing(name, f"get_peft_model_state_dict and the config's to_dict: {source}", tensors, config=stored)
