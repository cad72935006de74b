"""Which policy takes a pipeline, and what no policy can take."""

from typing import Any

from torch import nn

from texforce_hub.errors import TrainingError
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.lora import attach_lora
from texforce_hub.train.policies.ddim import as_ddim
from texforce_hub.train.policies.flow import as_flow
from texforce_hub.train.policies.flux import Flux
from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.policies.sd3 import StableDiffusion3
from texforce_hub.train.policies.sdxl import StableDiffusionXL
from texforce_hub.train.policies.stable_diffusion import StableDiffusion

_TRANSFORMERS: dict[str, type[Policy]] = {
    "SD3Transformer2DModel": StableDiffusion3,
    "FluxTransformer2DModel": Flux,
}
_FAMILIES = "Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, their turbo models, and Flux"


def make_policy(pipeline: Any, config: TrainConfig, *, seed: int) -> tuple[Policy, dict[str, nn.Parameter]]:
    """The policy of a pipeline's family, with new LoRAs on its CLIP encoders, and their parameters by name.

    Raises:
        TrainingError: a pipeline that no policy takes; the message says why.
        ConfigError: a setting that this family cannot have.
    """
    kind = _choose_class(pipeline)
    _check_parts(pipeline, kind)
    scheduler = as_ddim(pipeline.scheduler) if kind.network_name == "unet" else as_flow(pipeline.scheduler)
    encoders, parameters = attach_lora(
        {part: getattr(pipeline, part) for part in kind.trained}, config, seed=seed, idle=kind.trained
    )
    policy = kind(pipeline, encoders, scheduler, config)
    policy.check()
    return policy, parameters


def _choose_class(pipeline: Any) -> type[Policy]:
    name = type(pipeline).__name__
    if getattr(pipeline, "unet", None) is not None:
        if getattr(pipeline, "text_encoder_2", None) is None:
            return StableDiffusion
        if getattr(pipeline, "text_encoder", None) is None:
            raise TrainingError(f"{name} is SDXL's refiner, which begins in the middle of a chain; train its base")
        return StableDiffusionXL
    transformer = type(getattr(pipeline, "transformer", None)).__name__
    if transformer not in _TRANSFORMERS:
        what = f"a {transformer}" if transformer != "NoneType" else "no network"
        raise TrainingError(f"{name} has {what}; training knows {_FAMILIES}, whose CLIP text encoders learn")
    return _TRANSFORMERS[transformer]


def _check_parts(pipeline: Any, kind: type[Policy]) -> None:
    name, network = type(pipeline).__name__, getattr(pipeline, kind.network_name)
    for part in (*kind.trained, *(p.replace("text_encoder", "tokenizer") for p in kind.trained), "vae"):
        if getattr(pipeline, part, None) is None:
            raise TrainingError(f"{name} has no {part}; training {kind.__name__} needs it")
    channels = network.config.in_channels // (4 if kind is Flux else 1)
    if channels != pipeline.vae.config.latent_channels:
        raise TrainingError(
            f"the base's {kind.network_name} reads {channels} channels where latents have "
            f"{pipeline.vae.config.latent_channels}: it completes pictures; train a base that draws from text alone"
        )
    if network.config.get("time_cond_proj_dim"):
        raise TrainingError("the base reads its guidance as a number (LCM); train the base that it was distilled from")
