"""Files and folders appear whole or not at all; safetensors files are written tensor by tensor."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from texforce_hub.errors import FileError
from texforce_hub.files.leftovers import name_part, remove_leftovers
from texforce_hub.files.limits import check_words

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
"""Names that readers take for pickles, which are never written."""


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, to be made a file or a folder; it becomes ``path`` when the block ends.

    The bytes are on the disk before the name is changed, so a reader, a crash or a full disk sees the old
    content or the new one. If the block fails, nothing is left. Missing parent folders are made. A link stays a link:
    what it leads to is written. What writers that were killed have left beside ``path`` is removed.

    Raises:
        FileError: the path cannot be written, the disk is full, or ``path`` is a folder, a pipe, a device that exists.
    """
    path = Path(path)
    target = find_target(path)
    part = target.with_name(name_part(target.name))
    try:
        missing = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from error
    try:
        remove_leftovers(target.parent)
        yield part
        _sync(part)
        part.replace(target)
        if os.name == "posix":
            _sync_entry(target.parent)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from error
    except Exception as error:
        if not _says_full(error):
            raise
        raise FileError(f"{path}: cannot be written: {os.strerror(errno.ENOSPC)}") from error
    finally:
        _remove(part)
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()  # only where it is empty still: nothing was written


def copy_file(source: Path, target: Path) -> None:
    """A file's bytes under another name, whole or not at all.

    Raises:
        FileError: as :func:`writing`.
    """
    with writing(target) as part:
        shutil.copyfile(source, part)


def find_target(path: Path) -> Path:
    """What is written under a path: itself, or where its links lead; a name that can be written, by what has it now.

    Raises:
        FileError: it is no name, or a folder, a pipe, a socket or a device has it.
    """
    if "\0" in str(path):
        raise FileError(f"{str(path)!r}: a null character cannot be in a path; give another")
    try:
        target = path.resolve() if path.is_symlink() else path
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return target
    except (OSError, RuntimeError) as error:  # of links in a circle
        raise FileError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        raise FileError(f"{path}: is a folder that exists; name a file in it, or another folder")
    if not stat.S_ISREG(mode):
        raise FileError(f"{path}: is a pipe, a socket or a device; name a file")
    return target


def _says_full(error: Exception) -> bool:
    """Whether a library says in its own words that the disk is full."""
    return any(words in str(error) for words in ("No space left on device", "os error 28", "Disk quota exceeded"))


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


def check_tensor_name(path: str | os.PathLike[str]) -> None:
    """Refuse a name under which readers would take a safetensors file for a pickle.

    Raises:
        FileError: it has the ending of one.
    """
    if Path(path).suffix.lower() in PICKLE_SUFFIXES:
        raise FileError(f"{path}: pickles are not written; name a .safetensors file")


def write_tensors(path: str | Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file, whole or not at all; parent folders are made.

    The same tensors and metadata give the same bytes: tensors lie sorted by dtype, the widest first, then by
    name, and metadata by name. (The safetensors library writes metadata in random order.)

    Raises:
        FileError: a dtype the format has no name for, or the path cannot be written, or the disk is full.
    """
    return write_stream(path, tensors, tensors.items(), metadata)


def write_stream(
    path: str | Path,
    outline: Mapping[str, "Tensor"],
    tensors: Iterable[tuple[str, "Tensor"]],
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
    import torch  # here: whoever writes something else needs none

    check_tensor_name(path)
    ready = dict(sorted(outline.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header = _render_header(ready, {"format": "pt", **(metadata or {})})
    offsets = dict(zip(ready, accumulate((tensor.nbytes for tensor in ready.values()), initial=8 + len(header))))
    with writing(path) as part:
        try:
            with part.open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for name, tensor in tensors:
                    _check_announced(name, tensor, ready.pop(name, None))
                    file.seek(offsets[name])
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


def _check_announced(name: str, tensor: "Tensor", announced: "Tensor | None") -> None:
    if announced is None or (announced.shape, announced.dtype) != (tensor.shape, tensor.dtype):
        expected = "nothing" if announced is None else f"{tuple(announced.shape)} of {announced.dtype}"
        raise FileError(f"tensor {name!r} came as {tuple(tensor.shape)} of {tensor.dtype}; expected {expected}")


def _render_header(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> bytes:
    """The header's JSON, padded so that the tensors begin at a multiple of eight bytes."""
    from texforce_hub.files.torch_dtypes import NAMES

    _check_text(metadata)
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise FileError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold; cast it first")
        begin, end = end, end + tensor.nbytes
        table[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    check_words((*table, *metadata, *metadata.values()), "the file to write")
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return text + b" " * (-len(text) % 8)


def _check_text(metadata: Mapping[Any, Any]) -> None:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise FileError(f"metadata {key!r:.80} is {value!r:.80}; expected text as key and as value")
