"""What a torch pickle (``.bin``, ``.pt``, ``.ckpt``) holds, read without torch and without running any of it.

A pickle is a program. This reader runs the few instructions that describe tensors, in pure Python, where each
costs no more memory than the bytes that ask for it; everything else is refused by name. Both of torch's
containers are read: the zip archive (torch ≥ 1.6) and the older stream.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from texforce_hub.errors import FileError
from texforce_hub.files.dtypes import BITS
from texforce_hub.files.header import Header, TensorInfo, read_config, regular_size
from texforce_hub.files.limits import BoundedReader, check_count, check_shape, check_words, is_count
from texforce_hub.files.scalars import decode_scalar

_STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64"}
_STORAGES |= {"LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8"}
_STORAGES |= {"ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64"}
_DTYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"}
_DTYPES |= {"uint16": "U16", "uint32": "U32", "uint64": "U64"}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_BROKEN = (
    *(pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError),
    *(RecursionError, MemoryError, OverflowError, AssertionError, struct.error, zipfile.BadZipFile),
    *(NotImplementedError, RuntimeError, ImportError),
)


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str | None  # None: untyped bytes, the tensor says
    numel: int

    def bits(self) -> int:
        return self.numel * (8 if self.dtype is None else BITS[self.dtype])


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.shape, self.dtype)


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that the pickle may use: to call, if it is one of torch's rebuilding functions, or to mention."""

    name: str

    def __call__(self, *arguments: Any) -> Any:
        if self.name == "OrderedDict" and arguments in ((), ([],)):
            return OrderedDict()
        if self.name == "_rebuild_parameter":
            return arguments[0]
        if self.name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _rebuild(self.name, *arguments)
        raise pickle.UnpicklingError(f"calls {self.name}")


def _rebuild(version: str, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _Tensor:
    dtype = _DTYPES[rest[2].name] if version.endswith("v3") else storage.dtype
    if len(shape) != len(stride) or dtype is None or not all(map(is_count, (offset, *shape, *stride))):
        raise pickle.UnpicklingError("describes a tensor whose dtype, shape or stride is none")
    return _Tensor(storage, offset, tuple(shape), tuple(stride), dtype)


_ALLOWED = {("collections", "OrderedDict"), ("torch.storage", "UntypedStorage"), ("torch", "UntypedStorage")}
_ALLOWED |= {("torch._utils", f"_rebuild_{name}") for name in ("tensor_v2", "tensor_v3", "parameter")}
_ALLOWED |= {("torch", name) for name in (*_STORAGES, *_DTYPES)}


class _Unpickler(pickle._Unpickler):
    """Instructions that could ask for more memory or time than their bytes are taken out, and torch knows no frames."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: Mapping[int, Callable[..., Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[misc, assignment]
    _without = (pickle.FRAME, pickle.BYTEARRAY8, pickle.ADDITEMS, pickle.FROZENSET)
    for _code in (*_without, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX):
        del dispatch[_code[0]]  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _ForbiddenError(ascii(f"{module}.{name}")[1:-1])
        return _Global(name)

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _, numel = pid[:5]
        if kind != "storage" or not isinstance(key, str) or not is_count(numel):
            raise pickle.UnpicklingError("refers to something that is no storage")
        return _Storage(key, _STORAGES.get(storage.name), numel)

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._set_items([self.stack.pop(), value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(items)

    dispatch[pickle.SETITEM[0]] = load_setitem  # type: ignore[index]
    dispatch[pickle.SETITEMS[0]] = load_setitems  # type: ignore[index]

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):  # hashing a nested tuple can take forever
                raise pickle.UnpicklingError(f"has a {type(key).__name__} as a dictionary's key")
            if key in target:
                raise _DuplicateError(str(key))
            target[key] = value


class _ForbiddenError(Exception):
    """The pickle asks for this global."""


class _DuplicateError(Exception):
    """The pickle holds this name twice."""


def read_pickle_header(path: str | Path) -> Header:
    """Names, shapes and dtypes of a pickled state dict; nothing in it is run.

    A dict under ``state_dict`` is taken for the whole; a list's tensors are called by their place, ``0``, ``1`` …;
    values that are no tensors become metadata.

    Raises:
        FileError: no torch pickle, one that asks for more than tensors, or one that lies about its size.
    """
    path = Path(path)
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            archive = _open_archive(file)
            tensors, metadata = _flatten(archive.content, path)
            check_count(len(tensors), str(path))
            check_words((*tensors, *metadata, *metadata.values()), str(path))
            _check_claims(tensors, archive.sizes, size, path)
            scalars = dict(_read_scalars(tensors, archive.read))
    except _ForbiddenError as error:
        asked = str(error)[:80]
        raise FileError(f"{path}: refused: its pickle asks for {asked}; expected tensors and nothing else") from None
    except _DuplicateError as error:
        raise FileError(f"{path}: holds the name {str(error)!r:.100} twice; which one counts cannot be known") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _BROKEN as error:
        raise FileError(f"{path}: not a torch pickle, or a damaged one: {_reason(error)}") from error
    infos = {name: tensor.info for name, tensor in tensors.items()}
    return Header(MappingProxyType(infos), MappingProxyType(metadata), MappingProxyType(scalars), read_config(path))


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"it asks for {error.args[0]!r:.80}, which is no instruction and no entry of it"
    return str(error).split("\n")[0][:200] or type(error).__name__


@dataclass(frozen=True, slots=True)
class _Archive:
    content: Any
    sizes: Mapping[str, int]  # bytes of each storage
    read: Callable[[str, int, int], bytes]  # key, offset, length


def _open_archive(file: BinaryIO) -> _Archive:
    start = file.read(4)
    file.seek(0)
    return _open_zip(file) if start == b"PK\x03\x04" else _open_stream(file)


def _open_zip(file: BinaryIO) -> _Archive:
    archive = zipfile.ZipFile(file)
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename.partition("/")[2]
        if name in entries:
            raise _DuplicateError(entry.filename)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"entry {entry.filename!r} is compressed, which torch never does")
        entries[name] = entry
    if "data.pkl" not in entries:
        raise pickle.UnpicklingError("a zip archive without data.pkl")
    if archive.read(entries["byteorder"])[:6] == b"big" if "byteorder" in entries else False:
        raise pickle.UnpicklingError("written on a big-endian machine")
    content = _Unpickler(BoundedReader(io.BytesIO(archive.read(entries["data.pkl"]))), encoding="utf-8").load()
    sizes = {name.removeprefix("data/"): entry.file_size for name, entry in entries.items()}

    def read(key: str, offset: int, length: int) -> bytes:
        with archive.open(entries[f"data/{key}"]) as data:
            data.seek(offset)
            return data.read(length)

    return _Archive(content, sizes, read)


def _open_stream(file: BinaryIO) -> _Archive:
    if _Unpickler(BoundedReader(file)).load() != _LEGACY_MAGIC:
        raise pickle.UnpicklingError("a pickle that torch did not write")
    for _ in ("protocol version", "system"):
        _Unpickler(BoundedReader(file)).load()
    content = _Unpickler(BoundedReader(file), encoding="utf-8").load()
    keys = _Unpickler(BoundedReader(file)).load()
    bits = {tensor.storage.key: tensor.storage for tensor in _tensors_in(content)}
    starts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for key in keys:
        starts[key] = file.tell() + 8
        numel = struct.unpack("<q", file.read(8))[0]
        sizes[key] = numel * bits[key].bits() // (8 * max(bits[key].numel, 1))
        file.seek(starts[key] + sizes[key])

    def read(key: str, offset: int, length: int) -> bytes:
        file.seek(starts[key] + offset)
        return file.read(length)

    return _Archive(content, sizes, read)


def _tensors_in(content: Any) -> Iterator[_Tensor]:
    if isinstance(content, list):
        yield from (value for value in content if isinstance(value, _Tensor))
    if isinstance(content, dict):
        content = content.get("state_dict", content)
        yield from (value for value in content.values() if isinstance(value, _Tensor))


def _flatten(content: Any, path: Path) -> tuple[dict[str, _Tensor], dict[str, str]]:
    if isinstance(content, list):  # as cloneofsimo's trainer writes; a tensor is called by its place
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        raise FileError(f"{path}: holds a {type(content).__name__.strip('_')}; expected a dictionary of tensors")
    rest: dict[Any, Any] = {}
    if isinstance(content.get("state_dict"), dict):
        rest = {key: value for key, value in content.items() if key != "state_dict"}
        content = content["state_dict"]
    tensors: dict[str, _Tensor] = {}
    for key, value in content.items():
        if str(key) in tensors:  # 0 and "0"
            raise _DuplicateError(str(key))
        if isinstance(value, _Tensor):
            tensors[str(key)] = value
    rest |= {key: value for key, value in content.items() if not isinstance(value, _Tensor)}
    return tensors, {str(key): _described(value) for key, value in rest.items()}


def _described(value: Any) -> str:
    return str(value) if isinstance(value, (str, int, float, bool, type(None))) else f"({type(value).__name__})"


def _check_claims(tensors: Mapping[str, _Tensor], sizes: Mapping[str, int], size: int, path: Path) -> None:
    """What a tensor claims to hold must be in the file: a stride of 0 can claim terabytes from four bytes."""
    claimed = 0
    for name, tensor in tensors.items():
        check_shape(tensor.shape, name, str(path))
        storage, numel = tensor.storage, tensor.info.numel
        held = storage.bits() // BITS[tensor.dtype]
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride))
        if numel and (numel > held or last >= held):
            raise FileError(
                f"{path}: tensor {name!r:.100} claims {numel} elements of shape {tensor.shape!r:.80}, "
                f"its storage holds {held}"
            )
        if sizes.get(storage.key) != storage.bits() // 8:
            raise FileError(
                f"{path}: truncated: tensor {name!r:.100} needs {storage.bits() // 8} bytes, "
                f"the file holds {sizes.get(storage.key, 0)} of them"
            )
        claimed += numel * BITS[tensor.dtype] // 8
    if claimed > 4 * size or sum(sizes.values()) > size:
        raise FileError(f"{path}: its tensors claim {max(claimed, sum(sizes.values()))} bytes, the file has {size}")


def _read_scalars(
    tensors: Mapping[str, _Tensor], read: Callable[[str, int, int], bytes]
) -> Iterator[tuple[str, float]]:
    for name, tensor in tensors.items():
        if tensor.info.numel == 1:
            width = BITS[tensor.dtype] // 8
            value = decode_scalar(read(tensor.storage.key, tensor.offset * width, width), tensor.dtype)
            if value is not None:
                yield name, value
