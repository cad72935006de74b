"""The trained parameters: LoRAs on copies of the text encoders that share the frozen weights."""

import copy
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Generator, Tensor, nn

from texforce_hub import __version__
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import ConfigError, TrainingError
from texforce_hub.generate.prompts.sources import source_name
from texforce_hub.reading import is_there
from texforce_hub.rewards.licences import describe_licences
from texforce_hub.train.config import TrainConfig

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "out_proj"], ["fc1", "fc2"]
TARGETS = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}


def attach_lora(
    encoders: Mapping[str, nn.Module], config: TrainConfig, *, seed: int, idle: Mapping[str, int] | None = None
) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter]]:
    """Copies of the encoders, by part, with a LoRA on the layers of ``config.target``, and the LoRAs' parameters.

    A copy shares every weight of its original, which stays as it is; the new parameters are float32,
    ``down`` normal with deviation 1 / rank, ``up`` zero, so that the copy starts as the same function. Their
    names begin with the part. ``idle`` counts each encoder's last layers that get none.

    Raises:
        ConfigError: a pattern that cannot be read, or that no layer matches.
    """
    targets = {part: _targets(encoder, config) for part, encoder in encoders.items()}
    _check_patterns(config, [name for names in targets.values() for name in names])
    generator, adapted, parameters = Generator().manual_seed(seed), dict[str, nn.Module](), dict[str, nn.Parameter]()
    for part, encoder in encoders.items():
        shared = {id(t): t for t in (*encoder.parameters(), *encoder.buffers())}
        settings = _lora_settings(encoder, targets[part], config, (idle or {}).get(part, 0))
        adapted[part] = inject_adapter_in_model(settings, copy.deepcopy(encoder, memo=dict(shared))).eval()
        for name, parameter in adapted[part].named_parameters():
            if ".lora_" in name:
                parameter.data = _initial(name, parameter.shape, generator).to(parameter.device)
                parameter.requires_grad = True
                parameters[f"{part}.{name}"] = parameter
    return adapted, parameters


def _lora_settings(encoder: nn.Module, names: Sequence[str], config: TrainConfig, idle: int) -> LoraConfig:
    layers = list(range(cast(Any, encoder).config.num_hidden_layers - idle))
    ranks, alphas = (_read_pattern(entries) for entries in (config.rank_pattern, config.alpha_pattern))
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=TARGETS[config.target],
        layers_to_transform=layers if idle else None,
        lora_dropout=0.0,
        rank_pattern={pattern: int(value) for pattern, value in ranks.items() if _matches(pattern, names)},
        alpha_pattern={pattern: value for pattern, value in alphas.items() if _matches(pattern, names)},
    )


def _targets(encoder: nn.Module, config: TrainConfig) -> list[str]:
    """Names of the layers of the target's kinds."""
    return [name for name, _ in encoder.named_modules() if name.rpartition(".")[2] in TARGETS[config.target]]


def _matches(pattern: str, names: Sequence[str]) -> bool:
    """Whether PEFT would take the pattern for one of these layers."""
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)


def _check_patterns(config: TrainConfig, names: Sequence[str]) -> None:
    for entry in (*config.rank_pattern, *config.alpha_pattern):
        (pattern,) = _read_pattern([entry])
        if not _matches(pattern, names):
            raise ConfigError(f"pattern {entry!r} is of no trained layer; they are such as {names[0]}, by target")
    for entry in config.rank_pattern:
        if not entry.rpartition("=")[2].isdecimal():
            raise ConfigError(f"pattern {entry!r}; expected a whole number for a rank")


def _read_pattern(entries: Sequence[str]) -> dict[str, float]:
    """Values by PEFT's patterns, which match the end of a layer's name: ours may also be the name of what it is in."""
    pattern = {}
    for entry in entries:
        name, _, value = entry.rpartition("=")
        if not name or not value.replace(".", "", 1).isdecimal() or not 0 < float(value) <= sys.float_info.max:
            raise ConfigError(f"pattern {entry!r}; expected PATTERN=NUMBER, such as layers.0=8")
        try:
            re.compile(name)
        except re.error as error:
            raise ConfigError(f"pattern {entry!r} is no regular expression: {error}") from error
        pattern[rf"(?:{name})(\..+)?"] = float(value)
    return pattern


def _initial(name: str, shape: torch.Size, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator) / shape[0] if ".lora_A." in name else torch.zeros(shape)


def read_scales(encoders: Mapping[str, nn.Module]) -> dict[str, float]:
    """By what every layer's ``up @ down`` is multiplied: alpha / rank; names begin with the part."""
    return {
        f"{part}.{name}": module.scaling["default"]
        for part, encoder in encoders.items()
        for name, module in encoder.named_modules()
        if isinstance(module, LoraLayer)
    }


def _canonical(layer: str) -> str:
    # Published files say text_model. whatever the installed library calls it.
    part, _, path = layer.partition(".")
    return f"{part}.text_model.{path.removeprefix('text_model.')}"


def read_lora(parameters: Mapping[str, Tensor], scales: Mapping[str, float], metadata: dict[str, str]) -> Adapter:
    """The parameters as an adapter of the text encoders; a layer's scale is folded into ``up``."""
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


def describe_run(config: TrainConfig, step: int, prompts: Mapping[str, str] | None = None) -> dict[str, str]:
    """Where an adapter comes from, as metadata of its file; ``step`` is the step its weights are of.

    ``prompts`` is what else is known of them.

    Folders of this machine are named by their last component only, and where the run lay is left out.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in ("output", "device")}
    paths = ("base", "unet", "init")
    lists = ("prompts", "anchor_prompts", "samples", "decoder")
    settings |= {k: Path(settings[k]).name for k in paths if settings[k] and is_there(settings[k])}
    settings |= {k: source_name(settings[k]) for k in lists if settings[k]}
    facts = {"version": __version__, "reward": " ".join(config.reward), "steps": str(step)}
    facts |= {name: str(settings[name]) for name in ("base", "uncond", "seed")}
    facts |= prompts or {}
    licences = describe_licences(config.reward)
    facts |= {"reward_licenses": licences} if licences else {}
    facts["config"] = json.dumps(settings, sort_keys=True)
    return {f"texforce_hub.{name}": value for name, value in facts.items()}
