"""The trained parameters: a LoRA on a copy of the text encoder that shares the frozen weights."""

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Generator, Tensor, nn

from texforce_hub import __version__
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import ConfigError, TrainingError
from texforce_hub.reading import is_there
from texforce_hub.train.config import TrainConfig

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "out_proj"], ["fc1", "fc2"]
TARGETS = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}


def attach_lora(encoder: nn.Module, config: TrainConfig, *, seed: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of the encoder with a LoRA on the layers of ``config.target``, and the LoRA's parameters by name.

    The copy shares every weight of the original, which stays as it is; the new parameters are float32,
    ``down`` normal with deviation 1 / rank, ``up`` zero, so that the copy starts as the same function.

    Raises:
        ConfigError: a pattern that cannot be read.
    """
    shared = {id(t): t for t in (*encoder.parameters(), *encoder.buffers())}
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=TARGETS[config.target],
        lora_dropout=0.0,
        rank_pattern={name: int(value) for name, value in _read_pattern(config.rank_pattern).items()},
        alpha_pattern=_read_pattern(config.alpha_pattern),
    )
    adapted = inject_adapter_in_model(settings, copy.deepcopy(encoder, memo=dict(shared)))
    generator = Generator().manual_seed(seed)
    parameters = {}
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = _initial(name, parameter.shape, generator).to(parameter.device)
            parameters[name] = parameter.requires_grad_(requires_grad=True)
    return adapted.eval(), parameters


def _read_pattern(entries: Sequence[str]) -> dict[str, float]:
    pattern = {}
    for entry in entries:
        name, _, value = entry.rpartition("=")
        if not name or not value.replace(".", "", 1).isdecimal() or not 0 < float(value) <= sys.float_info.max:
            raise ConfigError(f"pattern {entry!r}; expected PATTERN=NUMBER, such as layers.0=8")
        pattern[name] = float(value)
    return pattern


def _initial(name: str, shape: torch.Size, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator) / shape[0] if ".lora_A." in name else torch.zeros(shape)


def read_scales(encoder: nn.Module) -> dict[str, float]:
    """By what every layer's ``up @ down`` is multiplied: alpha / rank."""
    return {name: module.scaling["default"] for name, module in encoder.named_modules() if hasattr(module, "scaling")}


def _canonical(layer: str) -> str:
    # Published files say text_model. whatever the installed library calls it.
    return f"text_encoder.text_model.{layer.removeprefix('text_model.')}"


def read_lora(parameters: Mapping[str, Tensor], scales: Mapping[str, float], metadata: dict[str, str]) -> Adapter:
    """The parameters as an adapter of the part ``text_encoder``; a layer's scale is folded into ``up``."""
    layers: dict[str, Any] = {}
    for name, down in parameters.items():
        layer, a, _ = name.partition(".lora_A.")
        if a:
            up = parameters[name.replace(".lora_A.", ".lora_B.")]
            layers[_canonical(layer)] = LowRank(down.detach().cpu().clone(), up.detach().cpu() * scales[layer])
    return Adapter(layers, metadata)


@torch.no_grad()
def load_lora(parameters: Mapping[str, nn.Parameter], scales: Mapping[str, float], adapter: Adapter) -> None:
    """Make the parameters mean what an adapter means; inverse of :func:`read_lora`.

    Rows that the adapter does not need keep their start, so that a lower rank can grow.

    Raises:
        TrainingError: the adapter has layers that are not trained, of another kind, or of a higher rank.
    """
    trained = {_canonical(layer): layer for layer in scales}
    if extra := sorted(set(adapter.layers) - set(trained)):
        raise TrainingError(f"init: its layer {extra[0]!r} is not trained here (of {len(extra)} such); see target")
    for name, layer in adapter.layers.items():
        down, up = (parameters[f"{trained[name]}.lora_{kind}.default.weight"] for kind in "AB")
        if not isinstance(layer, LowRank):
            raise TrainingError(f"init: {name} is {type(layer).__name__}; expected LoRA: texforce-hub resize it first")
        if layer.rank > len(down) or layer.down.shape[1:] != down.shape[1:] or len(layer.up) != len(up):
            raise TrainingError(
                f"init: {name} has rank {layer.rank} for a weight of shape {layer.shape}; expected at most rank "
                f"{len(down)} for {(len(up), down.shape[1])}: give --rank {layer.rank}, or texforce-hub resize it first"
            )
        down[: layer.rank] = layer.down
        up[:, : layer.rank] = layer.up * (layer.scale / scales[trained[name]])


def describe_run(config: TrainConfig, step: int) -> dict[str, str]:
    """Where an adapter comes from, as metadata of its file; ``step`` is the step its weights are of.

    Folders of this machine are named by their last component only, and where the run lay is left out.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in ("output", "device")}
    paths = ("base", "prompts", "unet", "init", "anchor_prompts", "samples")
    settings |= {k: Path(settings[k]).name for k in paths if settings[k] and is_there(settings[k])}
    facts = {"version": __version__, "reward": " ".join(config.reward), "steps": str(step)}
    facts |= {name: str(settings[name]) for name in ("base", "uncond", "seed")}
    facts["config"] = json.dumps(settings, sort_keys=True)
    return {f"texforce_hub.{name}": value for name, value in facts.items()}
