"""OneTrainer: its own LoRA modules and savers, on models without weights."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any
from unittest.mock import Mock, patch

from torch import Tensor

from tests.keys.foreign.listing import Listing, versions
from tests.keys.foreign.models import FAMILIES, make_towers, make_unet
from tests.keys.foreign.stand_ins import stand_in_for_missing

_LIBRARIES = ("diffusers", "transformers")
_TYPES = {"sd1": "STABLE_DIFFUSION_15", "sd2": "STABLE_DIFFUSION_20_BASE", "sdxl": "STABLE_DIFFUSION_XL_10_BASE"}
_PREFIXES = {"text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2", "unet": "unet"}
_OLD_PREFIXES = {
    "sd1": {"text_encoder": "lora_te", "unet": "lora_unet"},
    "sd2": {"text_encoder": "lora_te", "unet": "lora_unet"},
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "unet": "lora_unet"},
}
_FORMATS = {"comfy": "COMFY_LORA", "kohya": "KOHYA_LORA", "diffusers": "DIFFUSERS_LORA", "legacy": "LEGACY_LORA"}


def write_formats() -> Iterator[Listing]:
    """Its output formats of today: ComfyUI's, kohya's, ``diffusers``', its own older one, and bare original names."""
    stand_in_for_missing()
    formats = import_module("modules.util.enum.ModelFormat").ModelFormat
    source = f"Nerogar/OneTrainer 23df3832, {versions(*_LIBRARIES)}"
    for family in FAMILIES:
        model = _make_model(family, _PREFIXES)
        for name, form in _FORMATS.items():
            if name == "legacy" and family != "sdxl":  # the same as kohya's there
                continue
            tensors = _save(family, model, formats[form])
            made = f"comfy-{family}" if name == "comfy" else f"onetrainer-{name}-{family}"
            yield Listing(made, f"LoRASaver, {form}: {source}", tensors)
        model.text_encoder_lora = model.text_encoder_1_lora = model.text_encoder_2_lora = None
        tensors = _save(family, model, formats.ORIGINAL_LORA)
        yield Listing(f"onetrainer-original-{family}", f"LoRASaver, ORIGINAL_LORA: {source}", tensors)


def write_omi() -> Iterator[Listing]:
    """The format that it wrote until June 2026 where asked to."""
    stand_in_for_missing()
    formats = import_module("modules.util.enum.ModelFormat").ModelFormat
    source = f"Nerogar/OneTrainer 3e3b3e8f, {versions(*_LIBRARIES)}"
    for family in FAMILIES:
        model = _make_model(family, _OLD_PREFIXES[family])
        tensors = _save(family, model, formats.SAFETENSORS, enable_omi_format=True)
        yield Listing(f"omi-{family}", f"LoRASaver, enable_omi_format: {source}", tensors)


def _make_model(family: str, prefixes: Mapping[str, str]) -> Any:
    """Its model object with untrained LoRA modules on every layer, named as its setups name them."""
    wrap = import_module("modules.module.LoRAModule").LoRAModuleWrapper
    config = import_module("modules.util.config.TrainConfig").TrainConfig.default_values()
    config.lora_rank = 8
    model = getattr(import_module(f"modules.model.{_class(family)}Model"), f"{_class(family)}Model")(
        import_module("modules.util.enum.ModelType").ModelType[_TYPES[family]]
    )
    for part, module in (make_towers(family) | {"unet": make_unet(family)}).items():
        attribute = "text_encoder_1" if part == "text_encoder" and family == "sdxl" else part
        setattr(model, f"{attribute}_lora", wrap(module, prefixes[part], config))
    return model


def _save(family: str, model: Any, form: Any, **options: Any) -> dict[str, Tensor]:
    """What its saver hands to safetensors; hashing and moving to the CPU need values, which these tensors lack."""
    folder = "stableDiffusionXL" if family == "sdxl" else "stableDiffusion"
    saver = getattr(
        import_module(f"modules.modelSaver.{folder}.{_class(family)}LoRASaver"), f"{_class(family)}LoRASaver"
    )()
    here = patch.multiple(
        saver, _convert_state_dict_dtype=lambda tensors, _: tensors, _create_safetensors_header=Mock()
    )
    with here, patch("modules.modelSaver.mixin.LoRASaverMixin.save_file") as save_file:
        saver._save(model, form, "lora.safetensors", None, **options)
    return dict(save_file.call_args.args[0])


def _class(family: str) -> str:
    return "StableDiffusionXL" if family == "sdxl" else "StableDiffusion"
