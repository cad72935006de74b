"""torch's two containers of a pickle: the zip archive (torch ≥ 1.6) and the older stream."""

import io
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from texforce_hub.files.unpickler import DescribedTensor, DuplicateError, Storage, unpickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LOCAL_HEADER = 30  # bytes, without the name and the extra field, whose lengths are its last two numbers


@dataclass(frozen=True, slots=True)
class Archive:
    """What a pickle describes, and by key where in the file each storage's bytes begin and how many they are."""

    content: Any
    starts: Mapping[str, int]
    sizes: Mapping[str, int]


def open_archive(file: BinaryIO) -> Archive:
    """Read what a file's pickle describes; the tensors' bytes are left where they are.

    Raises:
        DuplicateError: it holds one name twice.
        Exception: many others, of a damaged one.
    """
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    return _open_zip(file) if start == b"PK\x03\x04" else _open_stream(file)


def _open_zip(file: BinaryIO) -> Archive:
    archive = zipfile.ZipFile(file)
    entries = _name_entries(archive.infolist())
    if "data.pkl" not in entries:
        raise pickle.UnpicklingError("a zip archive without data.pkl")
    if "byteorder" in entries and archive.read(entries["byteorder"])[:6] == b"big":
        raise pickle.UnpicklingError("written on a big-endian machine")
    content = unpickle(io.BytesIO(archive.read(entries["data.pkl"])))
    data = {name.removeprefix("data/"): entry for name, entry in entries.items() if name.startswith("data/")}
    starts = {key: _find_bytes(file, entry) for key, entry in data.items()}
    return Archive(content, starts, {key: entry.file_size for key, entry in data.items()})


def _name_entries(listed: Iterable[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Entries by their names inside the one folder that torch writes.

    Readers disagree about names that differ in case or hold a null character, and about several folders: such an
    archive would show one content to us and another to torch.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    lowered: set[str] = set()
    folders: set[str] = set()
    for entry in listed:
        folder, _, name = entry.filename.partition("/")
        folders.add(folder)
        if entry.filename.lower() in lowered:
            raise DuplicateError(entry.filename)
        lowered.add(entry.filename.lower())
        if entry.orig_filename != entry.filename or not entry.filename.isprintable() or len(folders) > 1:
            raise pickle.UnpicklingError(f"entry {entry.orig_filename!r:.80} is called as torch calls none")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise pickle.UnpicklingError(f"entry {entry.filename!r} is compressed, which torch never does")
        entries[name] = entry
    return entries


def _find_bytes(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin; the header in front of them must name it as the archive's table does."""
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    name_length, extra_length = struct.unpack_from("<HH", header, _LOCAL_HEADER - 4)
    if header[:4] != b"PK\x03\x04" or file.read(name_length) != entry.filename.encode("utf-8"):
        raise zipfile.BadZipFile(f"entry {entry.filename!r:.80} is not where the archive's table says")
    return entry.header_offset + _LOCAL_HEADER + int(name_length) + int(extra_length)


def _open_stream(file: BinaryIO) -> Archive:
    if unpickle(file) != _LEGACY_MAGIC:
        raise pickle.UnpicklingError("a pickle that torch did not write")
    for _ in ("protocol version", "system"):
        unpickle(file)
    content, keys = unpickle(file), unpickle(file)
    storages: dict[str, Storage] = {tensor.storage.key: tensor.storage for _, tensor in list_tensors(content)}
    starts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for key in keys:
        starts[key] = file.tell() + 8
        numel = struct.unpack("<q", file.read(8))[0]
        sizes[key] = numel * storages[key].nbytes // max(storages[key].numel, 1)
        file.seek(starts[key] + sizes[key])
    return Archive(content, starts, sizes)


def list_tensors(content: Any) -> list[tuple[str | int, DescribedTensor]]:
    """The tensors of a state dict, or of one under ``state_dict``, or of a list, by name or by number."""
    if isinstance(content, list):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        return []
    inner = content.get("state_dict")
    state = inner if isinstance(inner, dict) else content
    return [(name, value) for name, value in state.items() if isinstance(value, DescribedTensor)]
