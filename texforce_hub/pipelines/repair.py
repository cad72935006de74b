"""A pipeline folder that was saved with live adapters, sound again."""

from os import PathLike
from typing import Any

import torch

from texforce_hub.arguments import check_path
from texforce_hub.device import Dtype, choose_dtype
from texforce_hub.errors import PipelineError
from texforce_hub.pipelines.load import load_folder, load_pipeline
from texforce_hub.pipelines.spoilt import repaired_components
from texforce_hub.pipelines.verdict import Reading


def repair_pipeline(
    path: str | PathLike[str],
    *,
    tuned: bool = True,
    base: str | PathLike[str] | None = None,
    reading: Reading | None = None,
    dtype: Dtype = torch.float32,
) -> Any:
    """The pipeline of a folder that was saved with live adapters, sound again.

    Args:
        path: the folder.
        tuned: keep what the adapters learnt; ``False`` gives the base they were trained on.
        base: that base, to see whether the adapters had been fused before saving; without it that is guessed, and
            said to be a guess, or refused where the file cannot tell.
        reading: ``live`` or ``fused``, where you know.
        dtype: of the models.

    Raises:
        PipelineError: no pipeline folder, nothing in it needs repair, or it is not of this base.
        ConfigError: no dtype of this name.

    Example:
        >>> from texforce_hub import load_pipeline, repair_pipeline, save_pipeline
        >>> folder = save_pipeline(load_pipeline("shapes", device="cpu"), "saved")
        >>> repair_pipeline(folder)  # doctest: +SKIP
    """
    folder, kind = check_path(path), choose_dtype(dtype)
    if not (folder / "model_index.json").is_file():
        raise PipelineError(f"{folder} is no pipeline folder: it has no model_index.json")
    known = None if base is None else load_pipeline(base, device="cpu", dtype=kind)
    components = repaired_components(folder, kind, tuned=tuned, base=known, reading=reading)
    if not components:
        raise PipelineError(f"{folder} needs no repair: no component was saved with live adapters")
    return load_folder(folder, kind, **components)
