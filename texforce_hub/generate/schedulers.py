"""The samplers of image tools, by the names that those tools give them."""

from typing import Any

from texforce_hub.errors import ConfigError
from texforce_hub.settings import suggest_name

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++-sde-karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
"""Name → class in ``diffusers``, and what is changed in the pipeline's own configuration."""

_CALLED = {
    "euler-ancestral": "euler-a",
    "dpmpp": "dpm++",
    "dpmpp-2m": "dpm++",
    "dpm++-2m": "dpm++",
    "dpmpp-karras": "dpm++-karras",
    "dpmpp-2m-karras": "dpm++-karras",
    "dpm++-2m-karras": "dpm++-karras",
    "dpmpp-sde": "dpm++-sde",
    "dpmpp-2m-sde": "dpm++-sde",
    "dpm++-2m-sde": "dpm++-sde",
    "dpmpp-2m-sde-karras": "dpm++-sde-karras",
    "dpm++-2m-sde-karras": "dpm++-sde-karras",
    "plms": "pndm",
    "uni-pc": "unipc",
}
"""What A1111 and ComfyUI call the same sampler."""


def read_scheduler(name: str) -> str:
    """Our name of the sampler that is meant: ``DPM++ 2M Karras``, ``dpmpp_2m``, ``euler_ancestral`` … are understood.

    Raises:
        ConfigError: none is; the nearest is named.
    """
    plain = name.strip().lower().replace("_", "-").replace(" ", "-").removeprefix("k-")
    known = _CALLED.get(plain, plain)
    if known not in SCHEDULERS:
        hint = suggest_name(plain, [*SCHEDULERS, *_CALLED], otherwise="known are")
        raise ConfigError(f"no scheduler {name!r}; {hint}")
    return known


def set_scheduler(pipe: Any, name: str) -> None:
    """Give a pipeline another sampler, on its own noise schedule.

    Raises:
        ConfigError: no such sampler.
    """
    import diffusers

    kind, changes = SCHEDULERS[read_scheduler(name)]
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **changes)
