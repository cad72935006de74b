"""What a torch pickle (``.bin``, ``.pt``, ``.ckpt``) holds, read without torch and without running any of it."""

import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from texforce_hub.errors import FileError
from texforce_hub.files.archive import Archive, list_tensors, open_archive
from texforce_hub.files.dtypes import BITS
from texforce_hub.files.header import Layout, Span
from texforce_hub.files.limits import check_count, check_shape, check_words
from texforce_hub.files.opened import OpenFile
from texforce_hub.files.unpickler import DescribedTensor, DuplicateError, ForbiddenError
from texforce_hub.reading import first_line

_BROKEN = (
    *(pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError),
    *(RecursionError, MemoryError, OverflowError, AssertionError, struct.error, zipfile.BadZipFile),
    *(NotImplementedError, RuntimeError, ImportError),
)


def parse_pickle(file: OpenFile) -> Layout:
    """Where each tensor's bytes are, in a pickled state dict; nothing in it is run.

    A dict under ``state_dict`` is taken for the whole; a list's tensors are called by their place, ``0``, ``1`` …;
    values that are no tensors become metadata.

    Raises:
        FileError: no torch pickle, one that asks for more than tensors, or one that lies about its size.
    """
    with _explained(file.name):
        archive = open_archive(file.stream)
        tensors, metadata = _flatten(archive.content, file.name)
        check_count(len(tensors), file.name)
        check_words((*tensors, *metadata, *metadata.values()), file.name)
        _check_claims(tensors, archive.sizes, file)
        spans = {name: _span(tensor, archive) for name, tensor in tensors.items()}
    return Layout(MappingProxyType(spans), MappingProxyType(metadata))


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except ForbiddenError as error:
        asked = str(error)[:80]
        raise FileError(f"{name}: refused: its pickle asks for {asked}; expected tensors and nothing else") from None
    except DuplicateError as error:
        raise FileError(f"{name}: holds the name {str(error)!r:.100} twice; which one counts cannot be known") from None
    except OSError as error:
        raise FileError(f"{name}: cannot be read: {error.strerror or error}") from error
    except _BROKEN as error:
        raise FileError(f"{name}: not a torch pickle, or a damaged one: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"it asks for {error.args[0]!r:.80}, which is no instruction and no entry of it"
    return first_line(error)


def _flatten(content: Any, name: str) -> tuple[dict[str, DescribedTensor], dict[str, str]]:
    if isinstance(content, list):  # as cloneofsimo's trainer writes; a tensor is called by its place
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        raise FileError(f"{name}: holds a {_kind(content)}; expected a dictionary of tensors")
    tensors: dict[str, DescribedTensor] = {}
    for key, tensor in list_tensors(content):
        if str(key) in tensors:  # 0 and "0"
            raise DuplicateError(str(key))
        tensors[str(key)] = tensor
    rest = dict(content)
    if isinstance(content.get("state_dict"), dict):
        rest |= rest.pop("state_dict")
    others = {str(key): _described(value) for key, value in rest.items() if not isinstance(value, DescribedTensor)}
    return tensors, others


def _kind(value: Any) -> str:
    return "Tensor" if isinstance(value, DescribedTensor) else type(value).__name__.strip("_")


def _described(value: Any) -> str:
    return str(value) if isinstance(value, (str, int, float, bool, type(None))) else f"({_kind(value)})"


def _extent(tensor: DescribedTensor) -> int:
    """Elements of the storage from a tensor's first up to its last."""
    steps = zip(tensor.shape, tensor.stride, strict=True)
    return 1 + sum((n - 1) * step for n, step in steps) if tensor.info.numel else 0


def _check_claims(tensors: Mapping[str, DescribedTensor], sizes: Mapping[str, int], file: OpenFile) -> None:
    """What a tensor claims to hold must be in the file: a stride of 0 can claim terabytes from four bytes."""
    claimed = 0
    for name, tensor in tensors.items():
        check_shape(tensor.shape, name, file.name)
        storage, numel = tensor.storage, tensor.info.numel
        held = storage.nbytes // (BITS[tensor.dtype] // 8)
        if numel > held or tensor.offset * bool(numel) + _extent(tensor) > held:
            raise FileError(
                f"{file.name}: tensor {name!r:.100} claims {numel} elements of shape {tensor.shape!r:.80}, "
                f"its storage holds {held}"
            )
        if sizes.get(storage.key) != storage.nbytes:
            raise FileError(
                f"{file.name}: truncated: tensor {name!r:.100} needs {storage.nbytes} bytes, "
                f"the file holds {sizes.get(storage.key, 0)} of them"
            )
        claimed += numel * BITS[tensor.dtype] // 8
    if claimed > 4 * file.size or sum(sizes.values()) > file.size:
        most = max(claimed, sum(sizes.values()))
        raise FileError(f"{file.name}: its tensors claim {most} bytes, the file has {file.size}")


def _span(tensor: DescribedTensor, archive: Archive) -> Span:
    width = BITS[tensor.dtype] // 8
    begin = archive.starts[tensor.storage.key] + tensor.offset * width
    row_by_row = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    stride = None if tensor.stride == row_by_row else tensor.stride
    return Span(tensor.info, begin, begin + _extent(tensor) * width, stride)
