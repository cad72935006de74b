"""cloneofsimo's trainer: layers by position, in safetensors and in its bare lists."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tests.keys.foreign.listing import Listing, versions
from tests.keys.foreign.models import make_tower, make_unet
from tests.keys.foreign.stand_ins import stand_in_for_missing

_KINDS = {"sd1": "clip_l", "sd2": "clip_h"}


def write_positions() -> Iterator[Listing]:
    """SD1 and SD2: the trainer had one text encoder, and was left before SDXL came."""
    stand_in_for_missing()
    lora = import_module("lora_diffusion.lora")
    source = "cloneofsimo/lora d84074b3, " + versions("diffusers", "transformers")
    targets = {"text_encoder": lora.TEXT_ENCODER_DEFAULT_TARGET_REPLACE, "unet": lora.UNET_DEFAULT_TARGET_REPLACE}
    for family, kind in _KINDS.items():
        models = {"text_encoder": make_tower(kind), "unet": make_unet(family)}
        halves = {part: _inject(lora, model, targets[part]) for part, model in models.items()}
        how = "extract_lora_ups_down, keys as save_safeloras writes"
        metadata = {part: str(sorted(names)).replace("'", '"') for part, names in targets.items()}
        yield Listing(f"cloneofsimo-{family}", f"{how}: {source}", _positions(halves), metadata)
        for part, pairs in halves.items():
            how = f"extract_lora_ups_down, in the order of save_lora_weight's list: the {part}"
            yield Listing(f"cloneofsimo-list-{part.replace('_', '-')}-{family}", f"{how}: {source}", _listed(pairs))


def _inject(lora: Any, model: Any, targets: set[str]) -> list[tuple[Tensor, Tensor]]:
    with torch.device("meta"):
        lora.inject_trainable_lora(model, targets, r=4)
    return [(up.weight, down.weight) for up, down in lora.extract_lora_ups_down(model, targets)]


def _positions(halves: dict[str, list[tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    return {
        f"{part}:{place}:{role}": tensor
        for part, pairs in halves.items()
        for place, pair in enumerate(pairs)
        for role, tensor in zip(("up", "down"), pair, strict=True)
    }


def _listed(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A list has no keys: a reader calls its tensors by their places."""
    return {str(place): tensor for place, tensor in enumerate(tensor for pair in pairs for tensor in pair)}
