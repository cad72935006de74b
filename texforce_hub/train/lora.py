"""The trained parameters: a LoRA on a copy of the text encoder that shares the frozen weights."""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Generator, Tensor, nn

from texforce_hub import __version__
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.train.config import TrainConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def attach_lora(encoder: nn.Module, *, rank: int, alpha: float, seed: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of the encoder with a LoRA on its attention, and the LoRA's parameters by name.

    The copy shares every weight of the original, which stays as it is; the new parameters are float32,
    ``down`` normal with deviation 1 / rank, ``up`` zero, so that the copy starts as the same function.
    """
    shared = {id(t): t for t in (*encoder.parameters(), *encoder.buffers())}
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS), lora_dropout=0.0)
    adapted = inject_adapter_in_model(settings, copy.deepcopy(encoder, memo=dict(shared)))
    generator = Generator().manual_seed(seed)
    parameters = {}
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = _initial(name, parameter.shape, rank, generator).to(parameter.device)
            parameters[name] = parameter.requires_grad_(requires_grad=True)
    return adapted.eval(), parameters


def _initial(name: str, shape: torch.Size, rank: int, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator) / rank if ".lora_A." in name else torch.zeros(shape)


def read_lora(parameters: Mapping[str, Tensor], *, rank: int, alpha: float, metadata: dict[str, str]) -> Adapter:
    """The parameters as an adapter of the part ``text_encoder``; alpha / rank is folded into ``up``."""
    layers: dict[str, Any] = {}
    for name, down in parameters.items():
        place, a, _ = name.partition(".lora_A.")
        if a:
            up = parameters[name.replace(".lora_A.", ".lora_B.")]
            # Published files say text_model. whatever the installed library calls it.
            canonical = f"text_encoder.text_model.{place.removeprefix('text_model.')}"
            layers[canonical] = LowRank(down.detach().cpu().clone(), up.detach().cpu() * (alpha / rank))
    return Adapter(layers, metadata)


def describe_run(config: TrainConfig, step: int) -> dict[str, str]:
    """Where an adapter comes from, as metadata of its file; ``step`` is the step its weights are of.

    Folders of this machine are named by their last component only, and where the run lay is left out.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in ("output", "device")}
    settings |= {k: Path(settings[k]).name for k in ("base", "prompts") if settings[k] and Path(settings[k]).exists()}
    facts = {"version": __version__, "reward": " ".join(config.reward), "steps": str(step)}
    facts |= {name: str(settings[name]) for name in ("base", "uncond", "seed")}
    facts["config"] = json.dumps(settings, sort_keys=True)
    return {f"texforce_hub.{name}": value for name, value in facts.items()}
