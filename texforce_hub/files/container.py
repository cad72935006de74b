"""Which container a file is, by its first bytes and never by its name, and the header that it has as such."""

from pathlib import Path
from typing import Literal

from texforce_hub.errors import FileError
from texforce_hub.files.header import Header, Layout, describe, parse_layout, read_config
from texforce_hub.files.opened import OpenFile
from texforce_hub.files.pickles import parse_pickle

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


def open_header(path: str | Path) -> Header:
    """The header of a safetensors file or a torch pickle, whichever it is, and the PEFT config beside it.

    Raises:
        FileError: it is neither, or not what it says it is.
    """
    with OpenFile(path) as file:
        layout = read_layout(file, recognize_container(file))
        return describe(layout, file.read, name=file.name, config=read_config(file.path))
