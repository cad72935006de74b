"""The tensors of a file: copied out, never mapped; the file is opened once, and its header read once."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from texforce_hub.errors import FileError
from texforce_hub.files.container import Container, read_layout, recognize_container
from texforce_hub.files.header import Header, Layout, Span, describe, read_config
from texforce_hub.files.lazy_mapping import LazyMapping
from texforce_hub.files.memory import fresh_bytes
from texforce_hub.files.opened import OpenFile
from texforce_hub.files.torch_dtypes import DTYPES

_LOG = logging.getLogger("texforce_hub")


class TensorFile:
    """A safetensors file or a torch pickle, opened once: its header, and its tensors when they are asked for.

    It stays open until it is closed, or until nobody uses it or its :attr:`tensors` any more. Threads may share it.

    Attributes:
        container: what the file is, by its content and never by its name
        header: names, shapes, dtypes, metadata, and the PEFT config beside it
    """

    container: Container
    header: Header

    def __init__(self, path: str | Path, *, allow_pickle: bool = False) -> None:
        """Open it and read its header.

        Raises:
            FileError: the file is damaged, lies about its size, or is a pickle and ``allow_pickle`` is false, or one
                that asks for more than tensors.
        """
        self._file = OpenFile(path)
        try:
            self.container = recognize_container(self._file)
            self._check_container(allow_pickle=allow_pickle)
            self._layout: Layout = read_layout(self._file, self.container)
            config = read_config(self._file.path)
            self.header = describe(self._layout, self._file.read, name=self._file.name, config=config)
        except BaseException:
            self.close()
            raise

    def _check_container(self, *, allow_pickle: bool) -> None:
        path = self._file.path
        if self.container == "pickle" and not allow_pickle:
            raise FileError(
                f"{path}: is a pickle, which is not read unasked: texforce-hub convert {path} --allow-pickle --output "
                "…, or allow_pickle=True in Python"
            )
        if self.container == "pickle":
            _LOG.info("%s: a pickle; tensors are read from it and nothing is run", path)
        if (self.container == "safetensors") != (path.suffix.lower() == ".safetensors"):
            _LOG.warning("%s: is a %s file whatever its name says; read as that", path, self.container)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by name, each read anew whenever it is asked for; the file stays open for them."""
        return LazyMapping(self._layout.spans, self.read)

    def read(self, name: str) -> Tensor:
        """A copy of one tensor on the CPU, row by row, in the file's dtype.

        Raises:
            KeyError: there is none of this name.
            FileError: the file changed since it was opened, or torch cannot hold the dtype.
        """
        span = self._layout.spans[name]
        data = self._read_bytes(span.begin, span.end)
        self._file.check_unchanged()
        return self._shape(name, span, data)

    def read_all(self) -> dict[str, Tensor]:
        """All tensors on the CPU, as :meth:`read` gives them, by one look at the disk.

        Those of a safetensors file lie in one block of memory, which is kept as long as any of them is.

        Raises:
            FileError: as :meth:`read`.
        """
        spans = self._layout.spans
        if self.container == "pickle" or not spans:
            return {name: self.read(name) for name in spans}
        start = min(span.begin for span in spans.values())
        data = self._read_bytes(start, max(span.end for span in spans.values()))
        self._file.check_unchanged()
        return {
            name: self._shape(name, span, data[span.begin - start : span.end - start]) for name, span in spans.items()
        }

    def _read_bytes(self, begin: int, end: int) -> Tensor:
        try:
            data = fresh_bytes(end - begin)
        except RuntimeError as error:
            raise FileError(f"{self._file.path}: {end - begin} bytes of tensors are more than the memory") from error
        if data.numel():
            self._file.read_into(memoryview(data.numpy()), begin)  # type: ignore[arg-type]
        return data

    def _shape(self, name: str, span: Span, data: Tensor) -> Tensor:
        dtype = DTYPES.get(span.info.dtype)
        if dtype is None:
            raise FileError(
                f"{self._file.path}: tensor {name!r} has dtype {span.info.dtype}, which torch cannot hold; convert it"
            )
        if data.storage_offset() % dtype.itemsize:  # a view would not be aligned
            data = data.clone()
        if span.stride is None:
            return data.view(dtype).reshape(span.info.shape)
        return data.view(dtype).as_strided(span.info.shape, span.stride).clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Let go of the file; what was read stays."""
        self._file.close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def read_tensors(
    path: str | Path, *, device: str | torch.device | None = None, allow_pickle: bool = False
) -> tuple[Header, dict[str, Tensor]]:
    """A file's header and copies of all its tensors on ``device`` (default: the CPU), in the file's dtypes.

    The content decides what the file is, not its name. Memory: the tensors, once.

    Raises:
        FileError: as :class:`TensorFile`, or the file shrinks while it is read.
    """
    with TensorFile(path, allow_pickle=allow_pickle) as file:
        tensors = file.read_all()
    return file.header, {name: tensor.to(device or "cpu") for name, tensor in tensors.items()}


def stream_tensors(
    path: str | Path, *, device: str | torch.device | None = None, allow_pickle: bool = False
) -> tuple[Header, Mapping[str, Tensor]]:
    """A file's header and its tensors by name; each is read anew whenever it is asked for, and none is kept.

    Raises:
        FileError: as :class:`TensorFile`, some of it only when a tensor is asked for, and then also if the file is
            another one by now.
    """
    file = TensorFile(path, allow_pickle=allow_pickle)
    return file.header, LazyMapping(file.tensors, lambda name: file.read(name).to(device or "cpu"))
