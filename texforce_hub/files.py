"""The only opener and writer of tensor files. Tensors are copied out, never mapped; files appear whole or not."""

import json
import logging
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from texforce_hub.claims import check_words
from texforce_hub.container import open_header, sniff
from texforce_hub.errors import FileError
from texforce_hub.header import Header, Reader, Span, parse_header, parse_layout, read_config, regular_size
from texforce_hub.lazy import LazyMapping

_LOG = logging.getLogger("texforce_hub")

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""torch's dtypes by safetensors' names."""

_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_LOAD_ERRORS = (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, ValueError, TypeError, AttributeError)


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, to be made a file or a folder; it becomes ``path`` when the block ends.

    The bytes are on the disk before the name is changed, so a reader, a crash or a full disk sees the old
    content or the new one. If the block fails, nothing is left. Missing parent folders are made.

    Raises:
        FileError: the place cannot be written, is full, or ``path`` is a folder that exists.
    """
    path = Path(path)
    if "\0" in str(path):
        raise FileError(f"{str(path)!r}: a null character cannot be in a path; name another place")
    part = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.part")
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        if path.is_dir():
            raise FileError(f"{path}: is a folder that exists; name a file in it, or another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part)
        part.replace(path)
        if os.name == "posix":
            _sync_entry(path.parent)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        _remove(part)
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()  # only where it is empty still: nothing was written


def _sync(path: Path) -> None:
    """Everything at ``path`` on the disk; a folder's entries where folders can be opened (not on Windows)."""
    if path.is_dir():
        for inner in path.iterdir():
            _sync(inner)
    if path.is_file() or os.name == "posix":
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()


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


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file, whole or not at all; parent folders are made.

    The same tensors and metadata give the same bytes: tensors lie sorted by dtype, the widest first, then by
    name, and metadata by name. (The safetensors library writes metadata in random order.)

    Raises:
        FileError: a dtype the format has no name for, or the place cannot be written, or is full.
    """
    return write_stream(path, tensors, tensors.items(), metadata)


def write_stream(
    path: str | Path,
    outline: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    *,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """As :func:`write_tensors`, from tensors that come one by one in any order; none is kept.

    ``outline`` has each one's shape and dtype beforehand (tensors on the ``meta`` device will do). ``check`` looks
    at the whole file before it takes its place, and may refuse it.

    Raises:
        FileError: as :func:`write_tensors`, or the tensors are not those of the outline.
    """
    ready = dict(sorted(outline.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header = _render_header(ready, {"format": "pt", **(metadata or {})})
    places = dict(zip(ready, accumulate((tensor.nbytes for tensor in ready.values()), initial=8 + len(header))))
    with writing(path) as part:
        try:
            with part.open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for name, tensor in tensors:
                    _check_announced(name, tensor, ready.pop(name, None))
                    file.seek(places[name])
                    file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            needed = sum(tensor.nbytes for tensor in outline.values())
            reason = error.strerror or error
            raise FileError(f"{path}: cannot be written ({needed} bytes are needed): {reason}") from error
        if ready:
            raise FileError(f"{path}: {len(ready)} tensors never came, e.g. {next(iter(ready))!r}; nothing is written")
        if check is not None:
            check(part)
    return Path(path)


def _check_announced(name: str, tensor: Tensor, announced: Tensor | None) -> None:
    if announced is None or (announced.shape, announced.dtype) != (tensor.shape, tensor.dtype):
        expected = "nothing" if announced is None else f"{tuple(announced.shape)} of {announced.dtype}"
        raise FileError(f"tensor {name!r} came as {tuple(tensor.shape)} of {tensor.dtype}; expected {expected}")


def _render_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The header's JSON, padded so that the tensors begin at a multiple of eight bytes."""
    _check_text(metadata)
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise FileError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold; cast it first")
        begin, end = end, end + tensor.nbytes
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    check_words((*table, *metadata, *metadata.values()), "the file to write")
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return text + b" " * (-len(text) % 8)


def _check_text(metadata: Mapping[Any, Any]) -> None:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise FileError(f"metadata {key!r:.80} is {value!r:.80}; expected text as key and as value")
