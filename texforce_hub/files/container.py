"""Which container a file is, by its first bytes and never by its name, and the header that it has as such."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

from texforce_hub.errors import FileError
from texforce_hub.files.dtypes import BITS
from texforce_hub.files.header import Header, Layout, Span, describe, parse_layout, read_config
from texforce_hub.files.opened import OpenFile
from texforce_hub.files.pickles import parse_pickle

_AT_ONCE = 2**20  # bytes that are looked at together, a multiple of any number's size
Container = Literal["safetensors", "pickle"]

_STRANGERS = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself; run 'git lfs pull'",
    b"<": "an HTML or XML page, as a failed download leaves it; download it again",
    b"GGUF": "a GGUF model; expected safetensors or a torch pickle",
    b"\x89PNG": "a PNG picture; expected safetensors or a torch pickle",
    b"\xff\xd8\xff": "a JPEG picture; expected safetensors or a torch pickle",
    b"\x1f\x8b": "a gzip archive; unpack it first",
}


def sniff(path: str | Path) -> Container:
    """The container of a tensor file.

    Raises:
        FileError: the file cannot be read, or is something else by its first bytes.
    """
    with OpenFile(path) as file:
        return recognize_container(file)


def recognize_container(file: OpenFile) -> Container:
    """The container of an opened file.

    Raises:
        FileError: it is something else by its first bytes.
    """
    start = file.read(0, 32)
    if start[8:9] == b"{":
        return "safetensors"
    for mark, what in _STRANGERS.items():
        if start.startswith(mark):
            raise FileError(f"{file.name}: is {what}")
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "pickle"
    if file.path.suffix.lower() == ".safetensors" or not start:
        return "safetensors"
    raise FileError(f"{file.name}: neither a safetensors file nor a torch pickle; it begins with {start[:8]!r}")


def read_layout(file: OpenFile, container: Container) -> Layout:
    """Where each tensor's bytes are in an opened file; nothing in it is run.

    Raises:
        FileError: it is not what its first bytes say.
    """
    return parse_layout(file.read, file.size, name=file.name) if container == "safetensors" else parse_pickle(file)


def find_zeros(paths: Iterable[Path], names: Collection[str]) -> set[str]:
    """Which of the tensors of these names, in files that are opened for it, hold nothing but zeros.

    Raises:
        FileError: a file is neither container, or cannot be read.
    """
    zeros: set[str] = set()
    for path in paths:
        with OpenFile(path) as file:
            spans = read_layout(file, recognize_container(file)).spans
            zeros |= {name for name in names if name in spans and _is_zero(file, spans[name])}
    return zeros


def _is_zero(file: OpenFile, span: Span) -> bool:
    """Whether every number is 0 or -0, whose sign is the highest bit of its last byte."""
    size = max(1, BITS[span.info.dtype] // 8)
    for start in range(span.begin, span.end, _AT_ONCE):
        data = file.read(start, min(_AT_ONCE, span.end - start))
        if any(any(data[byte::size]) for byte in range(size - 1)) or not set(data[size - 1 :: size]) <= {0, 0x80}:
            return False
    return True


def open_header(path: str | Path) -> Header:
    """The header of a safetensors file or a torch pickle, whichever it is, and the PEFT config beside it.

    Raises:
        FileError: it is neither, or not what it says it is.
    """
    with OpenFile(path) as file:
        layout = read_layout(file, recognize_container(file))
        return describe(layout, file.read, name=file.name, config=read_config(file.path))
