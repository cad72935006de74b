"""The samplers of image tools, by the names that those tools give them."""

import logging
from inspect import signature
from typing import Any

from texforce_hub.errors import ConfigError
from texforce_hub.settings import suggest_name

_LOG = logging.getLogger("texforce_hub")
_ZERO_SNR = "rescale_betas_zero_snr"

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
    """Give a pipeline another sampler, on its own noise schedule; what that sampler cannot keep of it is logged.

    Raises:
        ConfigError: no such sampler, or the pipeline is sampled by flow matching or EDM, which none of these is.
    """
    from texforce_hub.pipelines.scheduler_facts import other_rule

    known = read_scheduler(name)
    if rule := other_rule(pipe.scheduler):
        raise ConfigError(f"--scheduler {name}: the base is sampled by {rule}, and none of ours is; leave it out")
    if pipe.scheduler.config.get(_ZERO_SNR) and not _keeps_zero_snr(known):
        others = ", ".join(other for other in SCHEDULERS if _keeps_zero_snr(other))
        _LOG.warning(
            "--scheduler %s: it has no %s, and the base was trained with noise that ends at zero signal: pictures keep "
            "a medium brightness; %s keep it",
            *(name, _ZERO_SNR, others),
        )
    kind, changes = SCHEDULERS[known]
    pipe.scheduler = _class_of(kind).from_config(pipe.scheduler.config, **changes)


def _keeps_zero_snr(name: str) -> bool:
    return _ZERO_SNR in signature(_class_of(SCHEDULERS[name][0]).__init__).parameters


def _class_of(kind: str) -> Any:
    import diffusers

    return getattr(diffusers, kind)
