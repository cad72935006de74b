"""Put a fine-tuned U-Net into a pipeline: a full one in any of the layouts trainers leave, or a U-Net LoRA."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from texforce_hub.apply.applied import apply_adapter
from texforce_hub.errors import FamilyError, PipelineError
from texforce_hub.families.original_unet import from_ldm
from texforce_hub.files.container import open_header
from texforce_hub.formats.live import is_live, true_name
from texforce_hub.hub.filenames import PICKLED, PREFERRED
from texforce_hub.hub.find import find_bundle, find_local
from texforce_hub.hub.huggingface.fetch import fetch_file
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.remote import RemotePath, find_remote
from texforce_hub.pipelines.build import build_unet
from texforce_hub.pipelines.folder import read_json, read_shapes, read_state, weight_files, weight_names
from texforce_hub.pipelines.scheduler_facts import restore_scheduler, take_noise
from texforce_hub.pipelines.spoilt import repair_state
from texforce_hub.reading import is_folder

logger = logging.getLogger("texforce_hub")

LDM_UNET = "model.diffusion_model."
_IN_A_FOLDER = ("unet", "unet_ema", "")
_CHECKPOINT = re.compile(r"(?:checkpoint|save)[-_](\d+)")


def put_unet(pipe: Any, unet: str) -> None:
    """Replace the pipeline's U-Net by a tuned one, or put a U-Net LoRA into it for good.

    Raises:
        FamilyError: a U-Net of another family than the pipeline's; nothing was read into it.
        PipelineError: nothing that holds a U-Net.
    """
    if getattr(pipe, "unet", None) is None:
        raise FamilyError(f"{type(pipe).__name__} has no U-Net to put another one in place of")
    ref = AdapterRef.parse(unet)
    path = _find(ref)
    files, config = _full_unet(path)
    if not files:
        _put_lora(pipe, ref, path)
        return
    if ref.weight != 1.0 or ref.parts:
        raise PipelineError(f"{unet}: {path} is a whole U-Net, which takes no weight; leave ':…' out")
    shapes = read_shapes(files)
    _check_family(path, {true_name(name): shape for name, shape in shapes.items()}, pipe.unet)
    state = read_state(files)
    if is_live(shapes):
        state = repair_state(state, name=str(path))
    own = config or dict(pipe.unet.config)
    pipe.register_modules(unet=build_unet(own, _plain_names(state), pipe.unet.dtype))
    pipe.scheduler = _scheduler_of(files, pipe.scheduler)


def _scheduler_of(files: list[Path], scheduler: Any) -> Any:
    """The pipeline's scheduler with what this U-Net's file, or the pipeline's folder that it lies in, says of it."""
    beside = files[0].parent.parent / "scheduler" / "scheduler_config.json"
    if files[0].parent.name in _IN_A_FOLDER and beside.is_file():
        return take_noise(scheduler, read_json(beside), beside)
    return restore_scheduler(scheduler, open_header(files[0]), files[0])


def _find(ref: AdapterRef) -> Path:
    """Where it lies here; what is on the Hub is fetched, a whole U-Net or an adapter."""
    path = find_local(ref)
    if path is not None:
        return path
    remote = find_remote(ref)
    for folder in ("unet/", ""):
        if f"{folder}config.json" in remote.names:
            return _fetch_unet(remote, folder)
    return find_bundle(ref).path


def _fetch_unet(remote: RemotePath, folder: str) -> Path:
    """The folder in the cache of a U-Net on the Hub, its configuration and weights fetched."""
    inside = [name.removeprefix(folder) for name in remote.names if name.startswith(folder)]
    names = weight_names([name for name in inside if "/" not in name], f"{remote}/{folder}".rstrip("/"))
    if not names[0].endswith(".safetensors"):
        raise PipelineError(
            f"{remote}: holds its U-Net as a pickle, which is not read from the Hub unasked; "
            f"'hf download {remote.repository.repo}', and give the folder"
        )
    for name in names:
        fetch_file(remote.file(f"{folder}{name}"))
    return fetch_file(remote.file(f"{folder}config.json")).parent


def _full_unet(path: Path) -> tuple[list[Path], dict[str, Any] | None]:
    """The files of a whole U-Net and its configuration, if it has one; no files if the path holds a LoRA."""
    if not is_folder(path):
        return ([path] if _holds_unet([path]) else []), None
    for name in _IN_A_FOLDER:
        folder = path / name
        if (folder / "config.json").is_file():
            return weight_files(folder), read_json(folder / "config.json")
    if (latest := latest_checkpoint(path)) is not None:
        logger.info("%s: using its latest checkpoint, %s", path, latest.name)
        return _full_unet(latest)
    bare = [file for file in sorted(path.iterdir()) if file.suffix == ".safetensors" and _holds_unet([file])]
    if len(bare) > 1:
        raise PipelineError(f"{path} holds several U-Nets: {', '.join(file.name for file in bare)}; name one")
    return bare, None


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the highest number in a training run's folder that holds no adapter of its own."""
    numbered = {
        int(match[1]): entry
        for entry in run.iterdir()
        if (match := _CHECKPOINT.fullmatch(entry.name)) and entry.is_dir()
    }
    final = any((run / name).is_file() for name in (*PREFERRED, *PICKLED))
    return numbered[max(numbered)] if numbered and not final else None


def _holds_unet(files: list[Path]) -> bool:
    names = {name.removeprefix(LDM_UNET) for path in files for name in open_header(path).tensors}
    return bool({"conv_in.weight", "input_blocks.0.0.weight"} & names)


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A U-Net's tensors under the names of ``diffusers``; what belongs to other models in the file stays out."""
    if any(name.startswith(LDM_UNET) for name in state):
        state = {n.removeprefix(LDM_UNET): t for n, t in state.items() if n.startswith(LDM_UNET)}
    if "input_blocks.0.0.weight" not in state:
        # Files of the attention-processor era carry a LoRA's tensors along, which their own loader ignored.
        return {name: tensor for name, tensor in state.items() if ".processor." not in name and ".lora_" not in name}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, parameter = name.rpartition(".")
        if (ours := from_ldm(layer)) is None:
            raise PipelineError(f"{name} is no tensor of a Stable Diffusion U-Net")
        renamed[f"{ours}.{parameter}"] = tensor
    return renamed


def _check_family(path: Path, shapes: Mapping[str, tuple[int, ...]], unet: Any) -> None:
    """Compare by shape before any weight is read."""
    theirs = dict(shapes)
    if any("input_blocks.0.0.weight" in name for name in theirs):
        theirs = _renamed_shapes(theirs)
    for name, parameter in unet.state_dict().items():
        seen = theirs.get(name)
        if seen != tuple(parameter.shape):
            says = "has no such layer" if seen is None else f"has {seen}"
            cross = unet.config.cross_attention_dim
            raise FamilyError(
                f"{path} is a U-Net of another family than the base: {name} is {tuple(parameter.shape)} in the base "
                f"(text width {cross}), the file {says}; give a base of its family"
            )


def _renamed_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    renamed = {}
    for name, shape in shapes.items():
        layer, _, parameter = name.removeprefix(LDM_UNET).rpartition(".")
        if (ours := from_ldm(layer)) is not None:
            renamed[f"{ours}.{parameter}"] = shape
    return renamed


def _put_lora(pipe: Any, ref: AdapterRef, path: Path) -> None:
    if is_folder(path):
        path = latest_checkpoint(path) or path
    adapter = read_adapter(path)
    part = adapter.only("unet")
    if not part.layers:
        raise PipelineError(f"{path} changes {', '.join(adapter.parts)}, not the U-Net; put it on with --adapter")
    if len(part.layers) < len(adapter.layers):
        logger.warning("%s: its text layers are left out here; put it on with --adapter for all of it", path)
    apply_adapter(pipe, [(part, dict(ref.parts) if ref.parts else ref.weight)], mode="fuse").keep()
