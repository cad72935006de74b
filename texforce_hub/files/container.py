"""Which container a file is, by its first bytes and never by its name, and the header that it has as such."""

from pathlib import Path
from typing import Literal

from texforce_hub.errors import FileError
from texforce_hub.files.header import Header, read_header, regular_size
from texforce_hub.files.pickles import read_pickle_header

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
    path = Path(path)
    regular_size(path)
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    if start[8:9] == b"{":
        return "safetensors"
    for mark, what in _STRANGERS.items():
        if start.startswith(mark):
            raise FileError(f"{path}: is {what}")
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "pickle"
    if path.suffix.lower() == ".safetensors" or not start:
        return "safetensors"
    raise FileError(f"{path}: neither a safetensors file nor a torch pickle; it begins with {start[:8]!r}")


def open_header(path: str | Path) -> Header:
    """The header of a safetensors file or a torch pickle, whichever it is; nothing in it is run.

    Raises:
        FileError: it is neither, or not what it says it is.
    """
    return read_header(path) if sniff(path) == "safetensors" else read_pickle_header(path)
