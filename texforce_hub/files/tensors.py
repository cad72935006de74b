"""Read the tensors of a file: copied out, never mapped."""

import logging
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from texforce_hub.errors import FileError
from texforce_hub.files.container import open_header, sniff
from texforce_hub.files.header import Header, Reader, Span, parse_header, parse_layout, read_config, regular_size
from texforce_hub.files.lazy_mapping import LazyMapping
from texforce_hub.files.torch_dtypes import DTYPES

_LOG = logging.getLogger("texforce_hub")
_LOAD_ERRORS = (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, ValueError, TypeError, AttributeError)


def read_tensors(
    path: str | Path, *, device: str | torch.device | None = None, allow_pickle: bool = False
) -> tuple[Header, dict[str, Tensor]]:
    """A file's header and copies of all its tensors on ``device`` (default: the CPU), in the file's dtypes.

    The content decides what the file is, not its name. Memory: the tensors, once.

    Raises:
        FileError: the file is damaged, lies about its size, shrinks while it is read, or is a pickle and
            ``allow_pickle`` is false, or one that asks for more than tensors.
    """
    header, tensors = stream_tensors(path, device=device, allow_pickle=allow_pickle)
    return header, dict(tensors)


def stream_tensors(
    path: str | Path, *, device: str | torch.device | None = None, allow_pickle: bool = False
) -> tuple[Header, Mapping[str, Tensor]]:
    """A file's header and its tensors by name; each is read anew whenever it is asked for, and none is kept.

    A pickle cannot be read in pieces: it is read whole, at once.

    Raises:
        FileError: as :func:`read_tensors`, some of it only when a tensor is asked for, and then also if the
            file is another one by now.
    """
    path, place = Path(path), torch.device(device or "cpu")
    container = sniff(path)
    if container == "pickle" and not allow_pickle:
        raise FileError(
            f"{path}: is a pickle, which is not read unasked: texforce-hub convert {path} --allow-pickle --output …, "
            f"or allow_pickle=True in Python"
        )
    if (container == "safetensors") != (path.suffix.lower() == ".safetensors"):
        _LOG.warning("%s: is a %s file whatever its name says; read as that", path, container)
    return _open_stream(path, place) if container == "safetensors" else _read_pickle(path, place)


def _open_stream(path: Path, device: torch.device) -> tuple[Header, Mapping[str, Tensor]]:
    size = regular_size(path)
    with _opened(path) as file:
        read = _reader(file)
        header = parse_header(read, size, name=str(path), config=read_config(path))
        spans = parse_layout(read, size, name=str(path)).spans
        identity = _identify(file)

    def read_tensor(name: str) -> Tensor:
        with _opened(path) as file:
            tensor = _read_span(file, name, spans[name], path)
            if _identify(file) != identity:
                raise FileError(f"{path}: changed while it was read; do it again")
        return tensor.to(device)

    return header, LazyMapping(spans, read_tensor)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error


def _identify(file: BinaryIO) -> tuple[int, ...]:
    """What another file of this name, or another content, would have otherwise."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _reader(file: BinaryIO) -> Reader:
    def read(offset: int, length: int) -> bytes:
        file.seek(offset)
        return file.read(length)

    return read


def _read_span(file: BinaryIO, name: str, span: Span, path: Path) -> Tensor:
    data = torch.empty(span.end - span.begin, dtype=torch.uint8)
    file.seek(span.begin)
    if data.numel() and file.readinto(data.numpy()) != data.numel():  # type: ignore[attr-defined]
        raise FileError(f"{path}: shrank while it was read; copy it again")
    return _shaped(data, name, span, path)


def _shaped(data: Tensor, name: str, span: Span, path: Path) -> Tensor:
    if span.info.dtype not in DTYPES:
        raise FileError(f"{path}: tensor {name!r} has dtype {span.info.dtype}, which torch cannot hold; convert it")
    return data.view(DTYPES[span.info.dtype]).reshape(span.info.shape)


def _read_pickle(path: Path, device: torch.device) -> tuple[Header, dict[str, Tensor]]:
    header = open_header(path)  # every claim is checked, and nothing but tensors is in it
    try:
        with _opened(path) as file:  # of a path, torch would believe the suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        raise FileError(f"{path}: not a torch pickle of tensors only, or a damaged one") from error
    content = dict(enumerate(content)) if isinstance(content, list) else content
    content = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    names = {str(key): key for key in content}
    tensors = {name: content[names[name]].detach() for name in header.tensors}
    return header, {name: _copied(tensor, device) for name, tensor in tensors.items()}


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).to(device)
