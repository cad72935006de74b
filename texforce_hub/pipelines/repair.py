"""Pipelines spoilt by saving them with live adapters: recognised, and repaired to the base or the tuned weights.

Such files hold ``X.base_layer.weight`` beside ``X.lora_A.<name>.weight`` and ``X.lora_B.<name>.weight``, and the
libraries fill ``X.weight`` with random numbers when they load them.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.apply.rounding import summed
from texforce_hub.errors import PipelineError
from texforce_hub.pipelines.build import build_model
from texforce_hub.pipelines.folder import folder_variant, read_json, read_shapes, read_state, weight_files

logger = logging.getLogger("texforce_hub")

_LORA = re.compile(r"(?P<layer>.+)\.lora_(?P<half>[AB])\.(?P<name>[^.]+)\.weight")


def is_spoilt(names: Iterable[str]) -> bool:
    """Whether these tensor names were saved from a model with live adapters."""
    return any(".base_layer." in name for name in names)


def repair_state(state: Mapping[str, Tensor], *, tuned: bool = True) -> dict[str, Tensor]:
    """The weights under their true names, the adapters summed in (``tuned``) or dropped.

    The files store no alpha: the adapters' scale is taken as 1 (alpha = rank), which is what the trainers that
    leave such files use.
    """
    repaired = {
        name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if not _LORA.fullmatch(name)
    }
    for name, down in state.items() if tuned else ():
        match = _LORA.fullmatch(name)
        if match is None or match["half"] != "A":
            continue
        up = state.get(f"{match['layer']}.lora_B.{match['name']}.weight")
        weight = f"{match['layer']}.weight"
        if up is None or weight not in repaired:
            raise PipelineError(f"{name} has no other half, or no base layer: this file cannot be repaired")
        repaired[weight] = summed(repaired[weight], [(LowRank(down, up.flatten(1)), 1.0)])
    return repaired


def spoilt_components(folder: Path) -> list[str]:
    """The components of a pipeline folder that were saved with live adapters."""
    parts = [entry for entry in sorted(folder.iterdir()) if entry.name.startswith(("text_encoder", "unet"))]
    for entry in parts:
        if (entry / "adapter_config.json").is_file() and not (entry / "config.json").is_file():
            raise PipelineError(
                f"{entry} holds an adapter and no model: its base was not saved; put it on one with --adapter {entry}"
            )
    folders = [entry for entry in parts if entry.is_dir() and (entry / "config.json").is_file()]
    return [part.name for part in folders if is_spoilt(read_shapes(weight_files(part)))]


def repaired_components(folder: Path, dtype: torch.dtype, *, tuned: bool = True) -> dict[str, Any]:
    """The spoilt components of a folder as sound models, said aloud; empty if there is none."""
    index = read_json(folder / "model_index.json")
    components: dict[str, Any] = {}
    for name in spoilt_components(folder):
        state = repair_state(read_state(weight_files(folder / name)), tuned=tuned)
        library, kind = index[name]
        components[name] = build_model(library, kind, read_json(folder / name / "config.json"), state, dtype)
        what = "with its adapters summed in (scale 1)" if tuned else "without its adapters"
        logger.warning("%s/%s was saved with live adapters; repaired %s", folder, name, what)
    return components


def repair_pipeline(path: str | PathLike[str], *, tuned: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of a folder that was saved with live adapters, sound again.

    ``tuned`` keeps what the adapters learnt; ``False`` gives the base they were trained on.

    Raises:
        PipelineError: no pipeline folder, or nothing in it needs repair.
    """
    folder = Path(path)
    if not (folder / "model_index.json").is_file():
        raise PipelineError(f"{folder} is no pipeline folder: it has no model_index.json")
    components = repaired_components(folder, dtype, tuned=tuned)
    if not components:
        raise PipelineError(f"{folder} needs no repair: no component was saved with live adapters")
    return DiffusionPipeline.from_pretrained(
        folder, dtype=dtype, variant=folder_variant(folder), local_files_only=True, **components
    )
