"""Save a pipeline, whole or not at all; portably, so that transformers 4 loads it as well."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from texforce_hub.apply.patch import tuner_layers
from texforce_hub.arguments import Pipeline, check_path, check_pipeline
from texforce_hub.errors import FileError, PipelineError
from texforce_hub.files.tensors import read_tensors
from texforce_hub.files.writing import write_tensors, writing
from texforce_hub.pipelines.quiet import quiet
from texforce_hub.pipelines.tokenizer import write_tokenizer_files
from texforce_hub.reading import first_line


def refuse_live_adapters(pipe: Any) -> None:
    """Refuse to save what the libraries would spoil.

    Raises:
        PipelineError: adapters ride beside some layers.
        ConfigError: it is no pipeline.
    """
    check_pipeline(pipe)
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module) and next(tuner_layers(component), None) is not None:
            raise PipelineError(
                f"{name} has live adapters, and saved like that nobody could read it: "
                "fuse the stack (mode='fuse'), or take it off"
            )


def save_pipeline(pipe: Pipeline, folder: str | PathLike[str], *, portable: bool = False) -> Path:
    """Save a pipeline folder with whatever is fused into it.

    ``portable``: text encoders under the names, and tokenizers in the files, that transformers 4 knows too.

    Raises:
        PipelineError: live adapters.
        FileError: the folder cannot be written.

    Example:
        >>> from texforce_hub import apply_adapter, load_pipeline, save_pipeline
        >>> pipeline = load_pipeline("shapes", device="cpu")
        >>> with apply_adapter(pipeline, "shapes-colour", mode="fuse"):
        ...     save_pipeline(pipeline, "with-colour").name
        'with-colour'
    """
    refuse_live_adapters(pipe)
    with writing(check_path(folder)) as part, quiet():
        _save(pipe, part, folder)
        if portable:
            for name, component in pipe.components.items():
                _make_portable(part / name, name, component)
    return Path(folder)


def _save(pipe: Any, part: Path, folder: str | PathLike[str]) -> None:
    try:
        pipe.save_pretrained(part, safe_serialization=True)
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # its word for a full disk, for which Python has an OSError
            raise
        raise FileError(f"{folder}: cannot be written: {first_line(error)}") from error


def _make_portable(folder: Path, name: str, component: Any) -> None:
    if name.startswith("text_encoder") and (folder / "model.safetensors").is_file():
        header, tensors = read_tensors(folder / "model.safetensors")
        if hasattr(component, "encoder") and hasattr(component, "final_layer_norm"):  # a CLIP without its prefix
            bare = [n for n in tensors if not n.startswith("text_model.")]
            tensors = {f"text_model.{n}" if n in bare else n: t for n, t in tensors.items()}
        write_tensors(folder / "model.safetensors", tensors, header.metadata)
    if name.startswith("tokenizer") and (pieces := _pieces(component)) is not None:
        vocabulary, merges = pieces
        lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        write_tokenizer_files(folder, vocabulary, lines, padding=component.pad_token, length=component.model_max_length)


def _pieces(tokenizer: Any) -> tuple[dict[str, int], list[Any]] | None:
    """Vocabulary and merges of a byte-pair tokenizer; ``None`` for other kinds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    return (model["vocab"], model["merges"]) if "merges" in model and "CLIP" in type(tokenizer).__name__ else None
