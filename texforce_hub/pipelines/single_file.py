"""Load a single-file checkpoint (the original latent-diffusion layout) of SD1, SD2 or SDXL, offline."""

import json
import logging
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from texforce_hub.errors import FamilyError, PipelineError
from texforce_hub.families.checkpoint import recognize_checkpoint
from texforce_hub.files.container import open_header
from texforce_hub.files.header import Header
from texforce_hub.files.writing import writing
from texforce_hub.pipelines.bad_value import say
from texforce_hub.pipelines.folder import read_json
from texforce_hub.pipelines.scheduler_facts import MODELSPEC, names_prediction, restore_scheduler
from texforce_hub.pipelines.tokenizer import write_tokenizer

logger = logging.getLogger("texforce_hub")

_PADDING = {"sd1": ("<|endoftext|>",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}


def checkpoint_family(header: Header) -> str:
    """``sd1``, ``sd2`` or ``sdxl``: the family of a checkpoint that is a whole pipeline.

    Raises:
        FamilyError: a family whose checkpoints are not read.
        PipelineError: no whole checkpoint.
    """
    family, names = recognize_checkpoint(header), list(header.tensors)
    whole = any(name.startswith(("cond_stage_model.", "conditioner.")) for name in names)
    if whole and family in _PADDING:
        return family
    if whole or family in ("flux", "sd3"):
        raise FamilyError(
            f"a checkpoint of {family or 'an unknown family'}; expected SD1, SD2 or SDXL's base: give its folder"
        )
    if any("conv_in.weight" in name or "input_blocks.0.0.weight" in name for name in names):
        raise PipelineError("a U-Net without text encoder and VAE; put it into a base with --unet")
    raise PipelineError(f"no Stable Diffusion checkpoint: its tensors are like {names[0] if names else 'none'!r}")


def load_single_file(path: Path, dtype: torch.dtype, *, config: Path | None = None) -> Any:
    """A pipeline from one file, its scheduler as the file says.

    ``config`` is a pipeline folder without weights; by default the family's own, with a tokenizer made from the
    vocabulary that an installed package carries.

    Raises:
        PipelineError: the file is no checkpoint, or the vocabulary is not installed.
    """
    header = open_header(path)
    try:
        family = checkpoint_family(header)
    except (FamilyError, PipelineError) as error:
        raise type(error)(f"{path}: {error}") from error
    if config is not None:
        pipe = _from_file(path, family, config, dtype)
    else:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / family
            write_config(family, made)
            pipe = _from_file(path, family, made, dtype)
    pipe.scheduler = restore_scheduler(pipe.scheduler, header, path)
    if family == "sd2" and not names_prediction(header):
        logger.warning(
            "%s does not say whether it predicts noise or v, and SD2 has models of both; drawn as noise. If pictures "
            "are grey or overdone, it is v: give its diffusers folder, or write %s = v into its header",
            path,
            MODELSPEC,
        )
    return pipe


def usual_scheduler(family: str) -> dict[str, Any]:
    """The configuration of the scheduler that every tool takes for granted for this family."""
    file = resources.files("texforce_hub.pipelines") / "configs" / family / "scheduler" / "scheduler_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def write_config(family: str, folder: Path) -> None:
    """A new pipeline folder of this family with configurations and tokenizers, without weights."""
    configs = resources.files("texforce_hub.pipelines") / "configs" / family
    with resources.as_file(configs) as shipped, writing(folder) as part:
        shutil.copytree(shipped, part)
        for number, padding in enumerate(_PADDING[family]):
            write_tokenizer(part / ("tokenizer" if number == 0 else f"tokenizer_{number + 1}"), padding=padding)


def _from_file(path: Path, family: str, config: Path, dtype: torch.dtype) -> Any:
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    index = read_json(config / "model_index.json")
    extra = {} if family == "sdxl" else {"safety_checker": None, "feature_extractor": None}
    extra = {name: value for name, value in extra.items() if name in index}
    try:
        pipe = kind.from_single_file(str(path), config=str(config), dtype=dtype, local_files_only=True, **extra)
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise whatever a damaged file makes them raise
        raise PipelineError(f"{path}: cannot be loaded: {say(error)}") from error
    return pipe
