"""Save one file in the original latent-diffusion layout (A1111, ComfyUI), or a text encoder as ComfyUI loads it."""

import re
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from texforce_hub.arguments import Pipeline, check_path
from texforce_hub.device import Dtype, given_dtype
from texforce_hub.errors import FamilyError, PipelineError
from texforce_hub.families.original_clip import AROUND, OPEN_CLIP
from texforce_hub.families.original_unet import to_ldm
from texforce_hub.files.writing import check_tensor_name, write_tensors
from texforce_hub.pipelines.save import refuse_live_adapters
from texforce_hub.pipelines.scheduler_facts import describe_scheduler
from texforce_hub.pipelines.single_file import usual_scheduler

_VAE = {"norm1": "norm1", "norm2": "norm2", "conv1": "conv1", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_RESNET = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)")
_VAE_SAMPLER = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv")


def save_checkpoint(pipe: Pipeline, file: str | PathLike[str], *, dtype: Dtype | None = None) -> Path:
    """Save an SD1, SD2 or SDXL pipeline as one checkpoint, with whatever is fused into it.

    SD2's original text encoder has a 24th block that no pipeline reads; like every ``diffusers`` export, the file
    holds 23. What the scheduler has to know is marked as other tools read it, and stands whole in the header.
    ``dtype``: the pipeline's own by default.

    Raises:
        FamilyError: another family.
        PipelineError: live adapters.
        FileError: the file cannot be written, or has a pickle's name.
        ConfigError: no dtype of this name.

    Example:
        >>> from texforce_hub import load_pipeline, save_checkpoint
        >>> pipeline = load_pipeline("my-sd15")  # doctest: +SKIP
        >>> save_checkpoint(pipeline, "mixed.safetensors")  # doctest: +SKIP
    """
    kind = given_dtype(dtype)
    check_tensor_name(check_path(file, "file"))
    refuse_live_adapters(pipe)
    family = pipeline_family(pipe)
    tensors = dict(_unet_tensors(pipe.unet, family))
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in _vae_tensors(pipe.vae)}
    tensors |= _text_tensors(pipe, family)
    if kind is not None:
        tensors = {name: t.to(kind) if t.is_floating_point() else t for name, t in tensors.items()}
    marks, metadata = describe_scheduler(pipe.scheduler, usual_scheduler(family))
    return write_tensors(Path(file), tensors | marks, metadata)


def pipeline_family(pipe: Any) -> str:
    """``sd1``, ``sd2`` or ``sdxl``, from the live models.

    Raises:
        FamilyError: another family, whose checkpoints are not written.
    """
    if getattr(pipe, "unet", None) is None or getattr(pipe, "text_encoder", None) is None:
        raise FamilyError(f"{type(pipe).__name__}: one-file checkpoints are written for SD1, SD2 and SDXL only")
    sdxl = getattr(pipe, "text_encoder_2", None) is not None
    levels, layers = len(pipe.unet.config.block_out_channels), pipe.unet.config.layers_per_block
    if (levels, layers) != (3 if sdxl else 4, 2):
        raise FamilyError(
            f"one-file checkpoints are written for SD1, SD2 and SDXL only: this U-Net has {levels} levels of "
            f"{layers} layers; use --save-pipeline (save_pipeline) instead"
        )
    if sdxl:
        return "sdxl"
    return "sd2" if pipe.text_encoder.config.hidden_act == "gelu" else "sd1"


def save_text_encoder(pipe: Pipeline, file: str | PathLike[str]) -> list[Path]:
    """Save the CLIP encoders as ComfyUI's CLIP loader takes them; one file each.

    A pipeline of two encoders gives ``<name>_clip_l`` and ``<name>_clip_g``.

    Raises:
        PipelineError: live adapters, or no CLIP encoder.
        FileError: a file cannot be written, or has a pickle's name.

    Example:
        >>> from texforce_hub import load_pipeline, save_text_encoder
        >>> [path.name for path in save_text_encoder(load_pipeline("shapes", device="cpu"), "text.safetensors")]
        ['text.safetensors']
    """
    check_tensor_name(check_path(file, "file"))
    refuse_live_adapters(pipe)
    named = {part: getattr(pipe, part, None) for part in ("text_encoder", "text_encoder_2")}
    encoders = {part: m for part, m in named.items() if m is not None and hasattr(m.config, "hidden_act")}
    encoders = {part: m for part, m in encoders.items() if m.config.model_type.startswith("clip")}
    if not encoders:
        raise PipelineError(f"{type(pipe).__name__} has no CLIP text encoder to save")
    path = Path(file)
    names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    return [
        write_tensors(
            path if len(encoders) == 1 else path.with_name(f"{path.stem}_{names[part]}{path.suffix or '.safetensors'}"),
            _clip_tensors(module),
        )
        for part, module in encoders.items()
    ]


def _clip_tensors(module: Any) -> dict[str, Tensor]:
    """A CLIP encoder under its published names, ``text_model.…`` and ``text_projection.weight``."""
    has = hasattr(module, "text_model")
    return {
        name if has or name.startswith("text_projection") else f"text_model.{name}": tensor
        for name, tensor in module.state_dict().items()
        if "position_ids" not in name
    }


def _unet_tensors(unet: Any, family: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in unet.state_dict().items():
        layer, _, parameter = name.rpartition(".")
        original = to_ldm(layer, family)
        if original is None:
            raise FamilyError(f"the U-Net's {name} has no place in an original checkpoint")
        yield f"model.diffusion_model.{original}.{parameter}", tensor


def _vae_tensors(vae: Any) -> Iterator[tuple[str, Tensor]]:
    levels = len(vae.config.block_out_channels)
    for name, tensor in vae.state_dict().items():
        layer, _, parameter = name.rpartition(".")
        attention = ".attentions.0.to_" in name
        value = tensor[..., None, None] if attention and tensor.dim() == 2 else tensor
        yield f"{_vae_name(layer, levels)}.{parameter}", value


def _vae_name(layer: str, levels: int) -> str:
    if match := _VAE_RESNET.fullmatch(layer):
        half, block, number, rest = match.groups()
        return f"{half}.{_vae_level(half, int(block), levels)}.block.{number}.{_VAE[rest]}"
    if match := _VAE_SAMPLER.fullmatch(layer):
        half, block, way = match.groups()
        return f"{half}.{_vae_level(half, int(block), levels)}.{way}sample.conv"
    half, _, rest = layer.partition(".mid_block.")
    if rest.startswith("attentions.0."):
        return f"{half}.mid.attn_1.{_VAE_ATTENTION[rest.removeprefix('attentions.0.')]}"
    if rest:
        _, number, inner = rest.split(".", 2)
        return f"{half}.mid.block_{int(number) + 1}.{_VAE[inner]}"
    return layer.replace("conv_norm_out", "norm_out")


def _vae_level(half: str, block: int, levels: int) -> str:
    return f"down.{block}" if half == "encoder" else f"up.{levels - 1 - block}"


def _text_tensors(pipe: Any, family: str) -> dict[str, Tensor]:
    first = _clip_tensors(pipe.text_encoder)
    if family == "sd1":
        return {f"cond_stage_model.transformer.{name}": tensor for name, tensor in first.items()}
    if family == "sd2":
        return {f"cond_stage_model.model.{name}": tensor for name, tensor in _open_clip_tensors(first)}
    second = _open_clip_tensors(_clip_tensors(pipe.text_encoder_2))
    tensors = {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in first.items()}
    return tensors | {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second}


def _open_clip_tensors(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A CLIP encoder under OpenCLIP's names: q, k and v in one matrix, the projection transposed."""
    for name, tensor in state.items():
        if name in AROUND:
            yield AROUND[name], tensor
        elif name == "text_projection.weight":
            yield "text_projection", tensor.T.contiguous()
        elif "self_attn.q_proj" in name:
            block, parameter = name.partition(".self_attn")[0], name.rpartition(".")[2]
            parts = [state[f"{block}.self_attn.{which}_proj.{parameter}"] for which in "qkv"]
            yield f"{_block_name(block)}.attn.in_proj_{parameter}", torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            block = ".".join(name.split(".")[:4])
            layer, _, parameter = name.removeprefix(f"{block}.").rpartition(".")
            yield f"{_block_name(block)}.{OPEN_CLIP[layer]}.{parameter}", tensor


def _block_name(block: str) -> str:
    return block.replace("text_model.encoder.layers.", "transformer.resblocks.")
