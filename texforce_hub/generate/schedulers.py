"""The samplers of image tools, by name."""

from typing import Any

import diffusers

from texforce_hub.errors import ConfigError

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
"""Name → class in ``diffusers``, and what is changed in the pipeline's own configuration."""


def set_scheduler(pipe: Any, name: str) -> None:
    """Give a pipeline another sampler, on its own noise schedule.

    Raises:
        ConfigError: no such sampler.
    """
    if name not in SCHEDULERS:
        raise ConfigError(f"no scheduler {name!r}; expected one of {', '.join(SCHEDULERS)}")
    kind, changes = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **changes)
