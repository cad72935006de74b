"""Load a base: the embedded one, a folder, a single-file checkpoint, or a Hub id; put a tuned U-Net in it."""

import logging
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel

from texforce_hub.device import choose_device, choose_dtype
from texforce_hub.errors import HubError, PipelineError
from texforce_hub.hub.huggingface.faults import is_outage
from texforce_hub.hub.huggingface.repository import ask_repository
from texforce_hub.hub.refs.hub_id import HubId
from texforce_hub.pipelines.bad_value import check_weights, explain, say
from texforce_hub.pipelines.configuration import check_configuration
from texforce_hub.pipelines.configuration import components as components_of
from texforce_hub.pipelines.folder import folder_variant
from texforce_hub.pipelines.pin import hub_base
from texforce_hub.pipelines.quiet import quiet
from texforce_hub.pipelines.single_file import load_single_file
from texforce_hub.pipelines.spoilt import repaired_components
from texforce_hub.pipelines.unet import put_unet
from texforce_hub.reading import is_folder, is_there
from texforce_hub.shapes import SHAPES, TURBO, WEIGHTS

logger = logging.getLogger("texforce_hub")


def load_pipeline(
    base: str | PathLike[str],
    *,
    unet: str | PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Any:
    """A diffusers pipeline, ready on its device.

    Args:
        base: ``shapes``, ``shapes-turbo``, a diffusers folder, a single-file checkpoint (SD1, SD2, SDXL), or a Hub id,
            with or without ``@revision``.
        unet: a fine-tuned U-Net to put in: a folder, a file, or a LoRA with ``:weight``.
        device: CUDA if present, else the CPU.
        dtype: float32 unless told otherwise, whatever the files hold.

    Raises:
        PipelineError: nothing that can be loaded is there.
        FamilyError: a U-Net of another family than the base.

    Example:
        >>> from texforce_hub import load_pipeline
        >>> type(load_pipeline("shapes", device="cpu")).__name__
        'StableDiffusionPipeline'
    """
    target, kind = choose_device(device), choose_dtype(dtype)
    with quiet():
        pipe = _load_base(str(base), kind)
        if unet is not None:
            put_unet(pipe, str(unet))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(target)


def _load_base(base: str, dtype: torch.dtype) -> Any:
    if base == "shapes-turbo":
        unet = UNet2DConditionModel.from_pretrained(TURBO / "unet").to(dtype)
        return load_folder(WEIGHTS, dtype, unet=unet, scheduler=DDIMScheduler.from_pretrained(TURBO / "scheduler"))
    path = WEIGHTS if base == "shapes" else Path(base)
    if is_folder(path):
        return load_folder(path, dtype)
    if is_there(path):
        return load_single_file(path, dtype)
    if (known := hub_base(base)) is not None:
        return _load_from_hub(known, dtype)
    raise PipelineError(
        f"no base {base!r}: expected {' or '.join(SHAPES)}, a folder, a checkpoint file, or a Hub id owner/name"
    )


def load_folder(path: Path, dtype: torch.dtype, **components: Any) -> Any:
    """A pipeline from a diffusers folder; ``components`` replace what lies in it."""
    if not (path / "model_index.json").exists():
        holds = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
        raise PipelineError(f"{path} is no diffusers pipeline: it has no model_index.json, it holds {holds}")
    index = check_configuration(path)
    variant = folder_variant(path)
    if variant is not None:
        logger.info("%s: using its %s files", path, variant)
    components = components or repaired_components(path, dtype)
    try:
        pipe = DiffusionPipeline.from_pretrained(
            path, dtype=dtype, variant=variant, local_files_only=True, **components
        )
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise whatever a damaged value makes them raise
        raise PipelineError(explain(path, error)) from error
    check_weights(pipe, path, [part for part in components_of(index) if part not in components])
    return pipe


def _ask_hub(base: HubId) -> str:
    """Why the Hub does not give a base: private, gated, missing; empty if it cannot be asked, or would give it."""
    try:
        ask_repository(base.repo, base.revision)
    except HubError as error:
        return "" if is_outage(error.__cause__) else str(error)
    return ""


def _load_from_hub(base: HubId, dtype: torch.dtype) -> Any:
    name = str(base)
    try:
        return DiffusionPipeline.from_pretrained(base.repo, revision=base.revision, dtype=dtype, use_safetensors=True)
    except MemoryError:
        raise
    except Exception as error:  # as above
        if refusal := _ask_hub(base):
            raise PipelineError(f"no base {name!r} on this machine, and on the Hub: {refusal}") from error
        if "not fully cached locally" in str(error):  # its cause is of another class for each way to be offline
            raise PipelineError(
                f"no base {name!r} on this machine, and the Hub cannot be reached: download it where it can, "
                f"'hf download {base.repo}', and give the folder"
            ) from error
        raise PipelineError(f"no base {name!r} on this machine or on the Hub: {say(error)}") from error
