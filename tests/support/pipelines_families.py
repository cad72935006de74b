"""Tiny random pipelines as every trainable family is configured: turbo chains, v-prediction at zero signal, flow."""

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from tests.support.pipelines_tiny import tiny_pipeline
from texforce_hub.train.config import TrainConfig

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ZERO_SNR = DDIMScheduler(
    **BETAS, clip_sample=False, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
)
TURBO = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
ANCESTRAL = EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
SHIFTED = FlowMatchEulerDiscreteScheduler(shift=3.0)
DYNAMIC = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)

FAMILIES = {
    "sd1": ("sd1", None),
    "sd2": ("sd2", ZERO_SNR),
    "sd-turbo": ("sd2", TURBO),
    "sdxl": ("sdxl", None),
    "sdxl-turbo": ("sdxl", ANCESTRAL),
    "sd3": ("sd3", SHIFTED),
    "flux": ("flux", DYNAMIC),
}
"""Family → the tiny pipeline of its structure, and its scheduler where it is another one."""

TURBO_SETTINGS = {"guidance": 0.0, "inference_steps": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "sd-turbo": TURBO_SETTINGS,
    "sdxl-turbo": TURBO_SETTINGS,
    "flux": {"resolution": 8},
}
"""What a family's runs need besides :data:`SHORT`."""

SHORT = {
    "steps": 3, "prompts_per_step": 2, "images_per_prompt": 2, "inference_steps": 4, "rank": 2, "alpha": 4.0,
    "reward": ("brightness",), "validate_every": 2, "validation_prompts": 2, "checkpoint_every": 1, "sheet_every": 0,
    "keep": "last", "anchor_count": 2, "batch_size": 64,
}  # fmt: skip


def family_pipeline(name):
    """A tiny pipeline of a family; its networks' zero-initialised ends are stirred, so that prompts matter."""
    structure, scheduler = FAMILIES[name]
    pipe = tiny_pipeline(structure)
    network = getattr(pipe, "unet", None) or pipe.transformer
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.1, generator=generator)
    if hasattr(pipe, "transformer"):
        pipe.vae.register_to_config(shift_factor=0.1)  # as those families have one
    if scheduler is not None:
        pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe


def family_config(name, output="unused", **changes):
    settings: dict[str, Any] = {**SHORT, **SETTINGS.get(name, {}), **changes}
    return TrainConfig(output=str(output), **settings)


def save_families(folder):
    """Every family as a folder that ``--base`` takes, for trying the command line by hand."""
    for name in FAMILIES:
        family_pipeline(name).save_pretrained(folder / name)


if __name__ == "__main__":
    import sys
    from pathlib import Path

    save_families(Path(sys.argv[1]))
