"""A reference to an adapter, and an adapter to files: the bytes are found, planned and decoded here."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from texforce_hub.adapter import Adapter, Layer
from texforce_hub.codec import Encoded, StoredAdapter, decode, decode_stored, encode, encode_stored
from texforce_hub.container import open_header, sniff
from texforce_hub.dialects import plan
from texforce_hub.errors import AdapterError, DialectError, FileError
from texforce_hub.files import DTYPES, stream_tensors, write_stream, writing
from texforce_hub.header import CONFIG_NAME, Header, TensorInfo
from texforce_hub.locate import find_file
from texforce_hub.refs import AdapterRef

_LOG = logging.getLogger("texforce_hub")


def read_adapter(
    path_or_ref: str | Path | AdapterRef,
    *,
    device: str | torch.device | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
) -> Adapter:
    """The adapter that a path, a folder, a catalogue name or a reference means, its tensors on ``device``.

    The change at weight 1: a reference's weight is for whoever applies it. ``alpha`` is the alpha of every layer
    that stores none (``rank`` otherwise). Local pickles are read, tensors only; those in a Hub cache need
    ``allow_pickle``.

    Raises:
        RefError: nothing, or nothing definite, of that name.
        FileError: the file is damaged or not what it says.
        DialectError: no layout fits the tensors' names.
        AdapterError: shapes that make no adapter, NaN or infinity.
    """
    path, header, tensors = _open(path_or_ref, device, allow_pickle=allow_pickle)
    with _naming(path):
        adapter = decode(plan(header), dict(tensors), alpha=alpha)
        check_finite(adapter)
        return adapter


def open_adapter(
    path_or_ref: str | Path | AdapterRef,
    *,
    device: str | torch.device | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
) -> StoredAdapter:
    """As :func:`read_adapter`, of an adapter that stays in its file: layers are read when they are looked at.

    The whole file is read and checked once, here, so that what can be wrong with it is said before any work.

    Raises:
        RefError, FileError, DialectError, AdapterError: as :func:`read_adapter`.
    """
    path, header, tensors = _open(path_or_ref, device, allow_pickle=allow_pickle)
    with _naming(path):
        stored = decode_stored(plan(header), _outlines(header), tensors, alpha=alpha)
        check_finite(stored)
        return stored


def read_outline(path_or_ref: str | Path | AdapterRef) -> Adapter:
    """As :func:`read_adapter`, from the file's header alone: every tensor is on the ``meta`` device, a shape only.

    Raises:
        RefError, FileError, DialectError: as :func:`read_adapter`, as far as a header can tell.
    """
    path = find_file(path_or_ref)
    header = open_header(path)
    with _naming(path):
        return decode_stored(plan(header), _outlines(header), {}).outline


def _open(
    path_or_ref: str | Path | AdapterRef, device: str | torch.device | None, *, allow_pickle: bool
) -> tuple[Path, Header, Mapping[str, Tensor]]:
    path = find_file(path_or_ref)
    if sniff(path) == "pickle":
        _LOG.info("%s: a pickle; tensors are read from it and nothing is run", path)
    header, tensors = stream_tensors(path, device=device, allow_pickle=allow_pickle or not _in_hub_cache(path))
    return path, header, tensors


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say in an error which file it is about."""
    try:
        yield
    except (DialectError, AdapterError) as error:
        raise type(error)(f"{path}: {error}") from error


def _outlines(header: Header) -> dict[str, Tensor]:
    return {name: _outline(name, info) for name, info in header.tensors.items()}


def _outline(name: str, info: TensorInfo) -> Tensor:
    if info.dtype not in DTYPES:
        raise DialectError(f"tensor {name!r} has dtype {info.dtype}, which torch cannot hold; convert it")
    return torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")


def _in_hub_cache(path: Path) -> bool:
    folders = path.absolute().parts
    return "snapshots" in folders and any(folder.startswith("models--") for folder in folders)


def check_finite(adapter: Adapter | StoredAdapter) -> None:
    """Refuse NaN and infinity, which would spread through the whole model.

    Raises:
        AdapterError: names the layers that hold any.
    """
    broken = [name for name, layer in adapter.layers.items() if not is_finite(layer)]
    if broken:
        raise AdapterError(
            f"NaN or infinity in {len(broken)} of {len(adapter.layers)} layers, e.g. {broken[0]!r}; "
            f"the training broke down or the file is damaged"
        )


def is_finite(layer: Layer) -> bool:
    """Whether every number of a layer is finite, its scale included."""
    found = [torch.isfinite(torch.tensor(getattr(layer, "scale", 1.0)))]

    def look(tensor: torch.Tensor) -> torch.Tensor:
        found.append(torch.isfinite(tensor.float()).all().cpu())
        return tensor

    layer.map(look)
    return all(map(bool, found))


def write_adapter(
    adapter: Adapter | StoredAdapter,
    path: str | Path,
    *,
    dialect: str = "diffusers",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write an adapter in one layout, whole or not at all; gives the file, or the folder of a PEFT adapter.

    ``path`` is a ``.safetensors`` file, or a folder, in which the file gets its layout's usual name. A stored
    adapter goes from file to file layer by layer.

    Raises:
        DialectError: the layout is unknown, or cannot hold some layer.
        FileError: the place cannot be written, or a PEFT adapter shall be a file.
    """
    path = Path(path)
    if isinstance(adapter, StoredAdapter):
        encoded, tensors = encode_stored(adapter, dialect, dtype=dtype)
    else:
        encoded = encode(adapter, dialect, dtype=dtype)
        tensors = iter(encoded.tensors.items())
    names_file = path.suffix == ".safetensors" and not path.is_dir()
    if encoded.config is not None:
        return _write_folder(encoded, tensors, path, names_file=names_file)
    file = path if names_file else path / encoded.filename
    return write_stream(file, encoded.tensors, tensors, encoded.metadata)


def _write_folder(encoded: Encoded, tensors: Iterable[tuple[str, Tensor]], path: Path, *, names_file: bool) -> Path:
    """A PEFT folder: as one rename if it is new, else its two files renamed back to back once both are whole."""
    if names_file:
        raise FileError(f"{path}: PEFT's layout is a folder of two files; name a folder")
    config = json.dumps(dict(encoded.config or {}), indent=2, sort_keys=True)
    if not path.exists():
        with writing(path) as part:
            part.mkdir()
            (part / CONFIG_NAME).write_text(config, "utf-8")
            write_stream(part / encoded.filename, encoded.tensors, tensors, encoded.metadata)
        return path
    with writing(path / encoded.filename) as weights, writing(path / CONFIG_NAME) as settings:
        settings.write_text(config, "utf-8")
        write_stream(weights, encoded.tensors, tensors, encoded.metadata)
    return path
