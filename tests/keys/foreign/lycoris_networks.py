"""LyCORIS: every kind of change that it trains, under kohya's names and under its wrapper's."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.keys.foreign.listing import Listing, versions
from tests.keys.foreign.models import FAMILIES, make_towers, make_unet, without_time

_WHOLE = {
    "locon": {"use_tucker": "True"},
    "loha": {"use_tucker": "True"},
    "lokr": {"use_tucker": "True", "decompose_both": "True"},
}
_TEXT_ONLY = {"full": {"train_norm": "True"}, "dora": {"dora_wd": "True"}}
"""These two read the base's weights, so that their models take memory."""
_PRESET = {
    "unet_target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
    "unet_target_name": [],
    "text_encoder_target_name": [],
}


def write_networks() -> Iterator[Listing]:
    """``lycoris.kohya`` as sd-scripts calls it, and ``create_lycoris`` as other trainers do."""
    import lycoris
    from lycoris.kohya import LycorisNetworkKohya

    source = versions("lycoris_lora", "peft", "diffusers", "transformers")
    LycorisNetworkKohya.apply_preset(_PRESET)
    for family in FAMILIES:
        for algorithm, options in (_WHOLE | _TEXT_ONLY).items():
            how = f"lycoris.kohya.create_network(algo={_algorithm(algorithm)}, {options})"
            tensors = _train(family, algorithm, options)
            yield Listing(f"lycoris-{algorithm}-{family}", f"{how}: {source}", tensors)
        lycoris.LycorisNetwork.apply_preset({"target_module": ["Attention"]})
        unet = without_time(make_unet(family))
        network = lycoris.create_lycoris(unet, 1.0, linear_dim=8, linear_alpha=4, algo="lora")
        network.apply_to()
        how = "lycoris.create_lycoris(unet, algo=lora)"
        yield Listing(f"lycoris-wrapper-{family}", f"{how}: {source}", network.state_dict())


def _algorithm(name: str) -> str:
    return "locon" if name == "dora" else name


def _train(family: str, algorithm: str, options: dict[str, str]) -> dict[str, Tensor]:
    from lycoris.kohya import create_network

    towers: Any = list(make_towers(family).values())
    whole = algorithm in _WHOLE
    unet = without_time(make_unet(family)) if whole else torch.nn.Module()
    if not whole:
        towers = [tower.to_empty(device="cpu") for tower in towers]
    towers = towers if len(towers) > 1 else towers[0]
    network = create_network(
        1.0, 8, 4, None, towers, unet, algo=_algorithm(algorithm), conv_dim=4 if whole else None, **options
    )
    network.apply_to(towers, unet, True, whole)
    return dict(network.state_dict())
