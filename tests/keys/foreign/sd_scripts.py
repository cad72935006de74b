"""kohya's own trainer: sd-scripts' network modules on its own U-Nets and transformers."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch

from tests.keys.foreign.listing import Listing, versions
from tests.keys.foreign.models import FAMILIES, make_t5, make_tower, make_towers
from tests.keys.foreign.stand_ins import stand_in_for_missing

_MARKS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_SD3 = {"adm_in_channels": 2048, "num_patches": 36864, "pos_embed_max_size": 192, "patch_size": 2, "depth": 24}


def write_networks() -> Iterator[Listing]:
    """SD1, SD2 and SDXL with convolutions; Flux and SD3 with T5."""
    stand_in_for_missing()
    source = versions("diffusers", "transformers") + ", kohya-ss/sd-scripts 48d368fa"
    for family in FAMILIES:
        towers = list(make_towers(family).values())
        trained = towers if family == "sdxl" else towers[0]
        tensors = _train("networks.lora", trained, _make_unet(family), 8, 4, conv_dim=4)
        metadata = {"ss_base_model_version": _MARKS[family], "ss_network_module": "networks.lora"}
        how = "networks.lora.create_network(conv_dim=4)"
        yield Listing(f"kohya-{family}", f"{how}: {source}", tensors, metadata)
    for family, towers, transformer in (
        ("flux", [make_tower("clip_l"), make_t5()], _make_flux()),
        ("sd3", [make_tower("clip_l"), make_tower("clip_g"), make_t5()], _make_sd3()),
    ):
        tensors = _train(f"networks.lora_{family}", towers, transformer, 4, 4, train_t5xxl="True")
        how = f"networks.lora_{family}.create_network(train_t5xxl=True)"
        metadata = {"ss_base_model_version": "flux1"} if family == "flux" else {}
        yield Listing(f"kohya-{family}", f"{how}: {source}", tensors, metadata)


def _train(module: str, towers: Any, model: Any, rank: int, alpha: int, **options: Any) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        network = import_module(module).create_network(1.0, rank, alpha, None, towers, model, **options)
        network.apply_to(towers, model, True, True)
    return dict(network.state_dict())


def _make_unet(family: str) -> Any:
    with torch.device("meta"):
        if family == "sdxl":
            return import_module("library.sdxl_original_unet").SdxlUNet2DConditionModel()
        make = import_module("library.original_unet").UNet2DConditionModel
        return make(64, 8, 768, False, False) if family == "sd1" else make(64, [5, 10, 20, 20], 1024, True, False)


def _make_flux() -> Any:
    models = import_module("library.flux_models")
    with torch.device("meta"):
        return models.Flux(models.configs["dev"].params)


def _make_sd3() -> Any:
    make = import_module("library.sd3_models").MMDiT
    with torch.device("meta"):
        return make(
            input_size=None,
            pos_embed_scaling_factor=None,
            pos_embed_offset=None,
            in_channels=16,
            context_embedder_in_features=4096,
            context_embedder_out_features=1536,
            **_SD3,
        )
