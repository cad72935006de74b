"""What a safetensors file says of itself, read without torch: names, shapes, dtypes, metadata, single numbers.

The format (safetensors 0.x): eight bytes, the header's length (little endian); the header, a JSON object; the
tensors' bytes, back to back. Every claim of the header is checked against the file before it is believed.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from texforce_hub.errors import FileError
from texforce_hub.files.dtypes import BITS
from texforce_hub.files.limits import LONGEST_CONFIG, check_count, check_shape, check_words, is_count
from texforce_hub.files.scalars import decode_scalar
from texforce_hub.reading import parse_json, read_bytes

LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself refuses longer ones."""
CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of one tensor; dtypes by safetensors' names (``F32``, ``BF16``, ``F8_E4M3`` …)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself.

    ``tensors`` are in the file's order under the file's names, ``metadata`` is its ``__metadata__``,
    ``scalars`` the values of its single-element tensors (``.alpha`` …), ``config`` the parsed
    ``adapter_config.json`` lying beside it, or ``None``.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """One tensor and its bytes in the file, from ``begin`` up to ``end``.

    ``stride``: elements from one entry of a dimension to the next, as pickles have it; ``None``: row by row.
    """

    info: TensorInfo
    begin: int
    end: int
    stride: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Every tensor's span, in the file's order, and the file's metadata."""

    spans: Mapping[str, Span]
    metadata: Mapping[str, str]


Reader = Callable[[int, int], bytes]
"""``read(offset, length)``: those bytes of a file or of a byte-range request, fewer at its end."""


def parse_header(read: Reader, size: int, *, name: str, config: Mapping[str, Any] | None = None) -> Header:
    """The checked header of ``size`` bytes that ``read`` gives, wherever they are; ``name`` is for errors.

    Raises:
        FileError: the bytes are no safetensors file, or the header does not fit them.
    """
    return describe(parse_layout(read, size, name=name), read, name=name, config=config)


def describe(layout: Layout, read: Reader, *, name: str, config: Mapping[str, Any] | None = None) -> Header:
    """The header of a file whose tensors lie as ``layout`` says: single numbers are read, and no other tensor.

    Raises:
        FileError: the bytes of a number are not there by now.
    """
    tensors = {key: span.info for key, span in layout.spans.items()}
    scalars = _read_scalars(read, layout, name)
    return Header(MappingProxyType(tensors), layout.metadata, MappingProxyType(scalars), config)


def parse_layout(read: Reader, size: int, *, name: str) -> Layout:
    """Where each tensor's bytes are, checked against ``size``.

    Raises:
        FileError: the bytes are no safetensors file, or the header does not fit them.
    """
    length = _header_length(read(0, 8), size, name)
    text = read_fully(read, 8, length, name)
    check_count(text.count(b'"data_offsets"'), name)  # before millions of names become objects
    entries = _parse_json(text, name)
    metadata = _check_metadata(entries.pop("__metadata__", {}), name)
    check_count(len(entries), name)
    check_words((*entries, *metadata, *metadata.values()), name)
    spans = {key: _check_entry(key, entry, 8 + length, name) for key, entry in entries.items()}
    _check_spans(spans, 8 + length, size, name)
    return Layout(MappingProxyType(spans), MappingProxyType(metadata))


def read_fully(read: Reader, offset: int, length: int, name: str) -> bytes:
    """Exactly ``length`` bytes.

    Raises:
        FileError: there are fewer by now.
    """
    data = read(offset, length)
    if len(data) < length:
        raise FileError(f"{name}: shrank while it was read; copy it again")
    return data


def read_config(path: Path) -> Mapping[str, Any] | None:
    """The ``adapter_config.json`` beside a file, parsed; ``None`` if there is none or the file is diffusers'.

    Raises:
        FileError: something of that name is there and is no JSON object in a file.
    """
    beside = path.parent / CONFIG_NAME
    if path.name.startswith("pytorch_lora_weights") or not os.path.lexists(beside):
        return None
    return parse_config(read_bytes(beside, most=LONGEST_CONFIG), str(beside))


def parse_config(text: bytes, name: str) -> Mapping[str, Any]:
    """An ``adapter_config.json``; ``name`` is for errors.

    Raises:
        FileError: it is not a JSON object.
    """
    try:
        words = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{name}: is no UTF-8 text (byte {error.start})") from error
    return MappingProxyType(parse_json(words, name))


def _header_length(prefix: bytes, size: int, name: str) -> int:
    if size == 0:
        raise FileError(f"{name}: is empty; an interrupted download or save leaves such files")
    if len(prefix) < 8:
        raise FileError(f"{name}: is {size} bytes long; too short for a safetensors file")
    length: int = struct.unpack("<Q", prefix)[0]
    if length > LONGEST_HEADER:
        raise FileError(f"{name}: not a safetensors file: its first bytes claim a header of {length} bytes")
    if length < 2:
        raise FileError(f"{name}: its header is {length} bytes long; expected at least '{{}}'")
    if 8 + length > size:
        raise FileError(f"{name}: truncated: a header of {length} bytes in a file of {size}; download or save it again")
    return length


class _DuplicateNameError(Exception):
    """One JSON object holds this name twice."""


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise _DuplicateNameError(key)
        entries[key] = value
    return entries


def _parse_json(text: bytes, name: str) -> dict[str, Any]:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
    except _DuplicateNameError as twice:
        raise FileError(
            f"{name}: the name {str(twice)!r:.100} is in the header twice; which one counts cannot be known"
        ) from None
    except UnicodeDecodeError as error:
        raise FileError(f"{name}: its header is not UTF-8 text (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{name}: its header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise FileError(f"{name}: its header is a JSON {type(entries).__name__}; expected an object")
    return entries


def _check_metadata(metadata: Any, name: str) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise FileError(f"{name}: __metadata__ is a JSON {type(metadata).__name__}; expected an object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise FileError(f"{name}: metadata {key!r:.100} is a JSON {type(value).__name__}; expected a string")
    return metadata


def _are_offsets(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_count, value)) and value[0] <= value[1]


def _check_entry(key: str, entry: Any, start: int, name: str) -> Span:
    if not isinstance(entry, dict) or {"dtype", "shape", "data_offsets"} - entry.keys():
        raise FileError(f"{name}: tensor {key!r:.100} lacks a dtype, a shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FileError(f"{name}: tensor {key!r:.100} has the unknown dtype {dtype!r:.40}; known: {', '.join(BITS)}")
    if not isinstance(shape, list) or not _are_offsets(offsets):
        raise FileError(f"{name}: tensor {key!r:.100} has shape {shape!r:.80} and data_offsets {offsets!r:.80}")
    check_shape(shape, key, name)
    info = TensorInfo(tuple(shape), dtype)
    begin, end = offsets
    if info.numel * BITS[dtype] != 8 * (end - begin):
        raise FileError(
            f"{name}: tensor {key!r:.100} of shape {shape!r:.80} and dtype {dtype} needs "
            f"{info.numel * BITS[dtype] // 8} bytes, its data_offsets span {end - begin}"
        )
    return Span(info, start + begin, start + end)


def _check_spans(spans: Mapping[str, Span], start: int, size: int, name: str) -> None:
    """The tensors must fill the bytes after the header exactly, without holes or overlaps."""
    position = start
    for key, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != position:
            gap = span.begin - position
            kind = "overlaps the one before it" if gap < 0 else f"leaves {gap} bytes unused"
            raise FileError(f"{name}: tensor {key!r:.100} {kind}; its header does not describe its bytes")
        position = span.end
    if position > size:
        raise FileError(
            f"{name}: truncated: its tensors need {position - start} bytes, {size - start} are there; "
            f"download or save it again"
        )
    if position < size:
        raise FileError(f"{name}: {size - position} bytes follow its last tensor; expected none")


def _read_scalars(read: Reader, layout: Layout, name: str) -> dict[str, float]:
    scalars = {}
    for key, span in layout.spans.items():
        if span.info.numel == 1 and BITS[span.info.dtype] >= 8:
            value = decode_scalar(read_fully(read, span.begin, span.end - span.begin, name), span.info.dtype)
            if value is not None:
                scalars[key] = value
    return scalars
