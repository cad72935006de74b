"""The instructions of a torch pickle, read without torch and without running any of them.

A pickle is a program. This reader runs the few instructions that describe tensors, in pure Python, where each
costs no more memory than the bytes that ask for it; everything else is refused by name.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from texforce_hub.files.dtypes import BITS
from texforce_hub.files.header import TensorInfo
from texforce_hub.files.limits import BoundedReader, is_count

_STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64"}
_STORAGES |= {"LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8"}
_STORAGES |= {"ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64"}
_DTYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"}
_DTYPES |= {"uint16": "U16", "uint32": "U32", "uint64": "U64"}


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes that tensors lie in, by the key that the pickle gives them; ``numel`` of ``dtype``."""

    key: str
    dtype: str | None  # None: untyped bytes, the tensor says
    numel: int

    @property
    def nbytes(self) -> int:
        """What the tensors' description says of its size."""
        return self.numel * (1 if self.dtype is None else BITS[self.dtype] // 8)


@dataclass(frozen=True, slots=True)
class DescribedTensor:
    """A tensor as a pickle describes it; ``offset`` and ``stride`` count elements of its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @property
    def info(self) -> TensorInfo:
        """Its shape and dtype."""
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


def _rebuild(version: str, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> DescribedTensor:
    dtype = _DTYPES[rest[2].name] if version.endswith("v3") else storage.dtype
    if len(shape) != len(stride) or dtype is None or not all(map(is_count, (offset, *shape, *stride))):
        raise pickle.UnpicklingError("describes a tensor whose dtype, shape or stride is none")
    return DescribedTensor(storage, offset, tuple(shape), tuple(stride), dtype)


_ALLOWED = {("collections", "OrderedDict"), ("torch.storage", "UntypedStorage"), ("torch", "UntypedStorage")}
_ALLOWED |= {("torch._utils", f"_rebuild_{name}") for name in ("tensor_v2", "tensor_v3", "parameter")}
_ALLOWED |= {("torch", name) for name in (*_STORAGES, *_DTYPES)}


class _Unpickler(pickle._Unpickler):
    """Python's, without the instructions that ask for more memory or time than their bytes, or change what was read."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: Mapping[int, Callable[..., Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[misc, assignment]
    _without = (pickle.FRAME, pickle.BYTEARRAY8, pickle.ADDITEMS, pickle.FROZENSET)
    for _code in (*_without, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX):
        del dispatch[_code[0]]  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ForbiddenError(ascii(f"{module}.{name}")[1:-1])
        return _Global(name)

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _, numel = pid[:5]
        if kind != "storage" or not isinstance(key, str) or not is_count(numel):
            raise pickle.UnpicklingError("refers to something that is no storage")
        return Storage(key, _STORAGES.get(storage.name), numel)

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._set_items([self.stack.pop(), value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set_items(items)

    def load_build(self) -> None:
        """What a state dict carries besides (its modules' versions) is left out: set, it could hide its methods."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict) or not isinstance(state, dict):
            raise pickle.UnpicklingError("sets the state of something that is no dictionary")

    dispatch[pickle.SETITEM[0]] = load_setitem  # type: ignore[index]
    dispatch[pickle.SETITEMS[0]] = load_setitems  # type: ignore[index]
    dispatch[pickle.DICT[0]] = load_dict  # type: ignore[index]
    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[index]

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise pickle.UnpicklingError(f"has a {type(target).__name__} for a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):  # hashing a nested tuple can take forever
                raise pickle.UnpicklingError(f"has a {type(key).__name__} as a dictionary's key")
            if key in target:
                raise DuplicateError(str(key))
            target[key] = value


def unpickle(file: BinaryIO) -> Any:
    """What the next pickle of a stream describes, tensors as :class:`DescribedTensor`; nothing in it is run.

    Raises:
        ForbiddenError: it asks for more than tensors.
        DuplicateError: a dictionary holds one name twice.
        Exception: many others, of a damaged one.
    """
    return _Unpickler(BoundedReader(file), encoding="utf-8").load()


class ForbiddenError(Exception):
    """The pickle asks for this global."""


class DuplicateError(Exception):
    """The pickle holds this name twice."""
