"""What lies in a diffusers folder: weight files, their names and shapes, their tensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from texforce_hub import reading
from texforce_hub.errors import PipelineError
from texforce_hub.families.names import PARTS
from texforce_hub.files.container import open_header
from texforce_hub.files.tensors import stream_tensors

_LONGEST_JSON = 10_000_000  # bytes; configurations have a few thousand
WEIGHT_SUFFIXES = (".safetensors", ".bin")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


def folder_variant(folder: Path) -> str | None:
    """``fp16`` if some component has its weights only in files of that variant; ``None`` if plain files will do."""
    for component in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        files = [path for path in component.iterdir() if path.suffix in WEIGHT_SUFFIXES]
        if files and all(".fp16." in path.name for path in files):
            return "fp16"
    return None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold one model's weights: safetensors before pickles, full precision before fp16, shards all.

    Raises:
        PipelineError: there is none.
    """
    return [folder / name for name in weight_names([path.name for path in folder.iterdir()], str(folder))]


def weight_names(names: Sequence[str], folder: str) -> list[str]:
    """As :func:`weight_files`, of a folder known by its files' names; ``folder`` is for errors.

    Raises:
        PipelineError: there is none.
    """
    files = [name for name in sorted(names) if name.endswith(WEIGHT_SUFFIXES) and name.startswith(_STEMS)]
    for suffix in WEIGHT_SUFFIXES:
        for fp16 in (False, True):
            if chosen := [name for name in files if name.endswith(suffix) and (".fp16" in name) == fp16]:
                return chosen
    holds = ", ".join(sorted(names)[:6]) or "nothing"
    raise PipelineError(f"{folder} has no weights file; expected {_STEMS[0]}.safetensors or the like, it holds {holds}")


def read_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in these files, from their headers alone."""
    return {name: info.shape for path in files for name, info in open_header(path).tensors.items()}


def read_state(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of these files, on the CPU. Local pickles are read, tensors only.

    Each has memory of its own: models are built from them, and kernels give other last bits on unaligned ones.
    """
    return {name: tensor for path in files for name, tensor in stream_tensors(path, allow_pickle=True)[1].items()}


def stream_parameters(folder: Path) -> Mapping[str, Tensor] | None:
    """The parameters of a pipeline folder's encoders and denoiser by canonical name, each read when asked for.

    ``None`` for a folder that holds no such part, or one saved with live adapters, whose names are not the model's.

    Raises:
        PipelineError: a part without weights.
        FileError: a damaged file.
    """
    parameters: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    for part in (part for part in PARTS if (folder / part).is_dir()):
        for path in weight_files(folder / part):
            header, stream = stream_tensors(path, allow_pickle=True)
            names = [name for name in stream if header.tensors[name].dtype.startswith(("F", "BF"))]
            if any(".base_layer." in name or "lora_" in name for name in names):
                return None
            parameters |= {f"{part}.{published_name(part, name, names)}": (stream, name) for name in names}
    return _Parameters(parameters) if parameters else None


def published_name(part: str, name: str, names: Iterable[str]) -> str:
    """A parameter's published spelling: newer libraries dropped ``text_model.`` from the plain CLIP encoder."""
    flat = part.startswith("text_encoder") and any(other.startswith("embeddings.") for other in names)
    return f"text_model.{name}" if flat else name


class _Parameters(Mapping[str, Tensor]):
    def __init__(self, sources: Mapping[str, tuple[Mapping[str, Tensor], str]]) -> None:
        self._sources = sources

    def __getitem__(self, name: str) -> Tensor:
        stream, key = self._sources[name]
        return stream[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def read_json(path: Path) -> dict[str, Any]:
    """A configuration, a JSON object.

    Raises:
        PipelineError: it is missing, no regular file, longer than any configuration, or no such thing.
    """
    return reading.read_json(path, most=_LONGEST_JSON, error=PipelineError)
