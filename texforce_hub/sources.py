"""A reference to an adapter, and an adapter to files: the bytes are found, planned and decoded here."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from texforce_hub.adapter import Adapter, Layer
from texforce_hub.codec import Encoded, decode, encode
from texforce_hub.container import open_header, sniff
from texforce_hub.dialects import plan
from texforce_hub.errors import AdapterError, DialectError, FileError
from texforce_hub.files import DTYPES, read_tensors, write_tensors, writing
from texforce_hub.header import CONFIG_NAME, TensorInfo
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
    path = find_file(path_or_ref)
    if sniff(path) == "pickle":
        _LOG.info("%s: a pickle; tensors are read from it and nothing is run", path)
    header, tensors = read_tensors(path, device=device, allow_pickle=allow_pickle or not _in_hub_cache(path))
    try:
        adapter = decode(plan(header), tensors, alpha=alpha)
        check_finite(adapter)
    except (DialectError, AdapterError) as error:
        raise type(error)(f"{path}: {error}") from error
    return adapter


def read_outline(path_or_ref: str | Path | AdapterRef) -> Adapter:
    """As :func:`read_adapter`, from the file's header alone: every tensor is on the ``meta`` device, a shape only.

    Raises:
        RefError, FileError, DialectError: as :func:`read_adapter`, as far as a header can tell.
    """
    path = find_file(path_or_ref)
    header = open_header(path)
    try:
        tensors = {name: _outline(name, info) for name, info in header.tensors.items()}
        found = plan(header)
        once = {name: replace(layer, twins=()) for name, layer in found.layers.items()}  # values cannot be compared
        return decode(replace(found, layers=once), tensors)
    except (DialectError, AdapterError) as error:
        raise type(error)(f"{path}: {error}") from error


def _outline(name: str, info: TensorInfo) -> Tensor:
    if info.dtype not in DTYPES:
        raise DialectError(f"tensor {name!r} has dtype {info.dtype}, which torch cannot hold; convert it")
    return torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")


def _in_hub_cache(path: Path) -> bool:
    folders = path.absolute().parts
    return "snapshots" in folders and any(folder.startswith("models--") for folder in folders)


def check_finite(adapter: Adapter) -> None:
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
    adapter: Adapter, path: str | Path, *, dialect: str = "diffusers", dtype: torch.dtype | None = None
) -> Path:
    """Write an adapter in one layout, whole or not at all; gives the file, or the folder of a PEFT adapter.

    ``path`` is a ``.safetensors`` file, or a folder, in which the file gets its layout's usual name.

    Raises:
        DialectError: the layout is unknown, or cannot hold some layer.
        FileError: the place cannot be written, or a PEFT adapter shall be a file.
    """
    path = Path(path)
    encoded = encode(adapter, dialect, dtype=dtype)
    names_file = path.suffix == ".safetensors" and not path.is_dir()
    if encoded.config is not None:
        return _write_folder(encoded, path, names_file=names_file)
    file = path if names_file else path / encoded.filename
    return write_tensors(file, encoded.tensors, encoded.metadata)


def _write_folder(encoded: Encoded, path: Path, *, names_file: bool) -> Path:
    """A PEFT folder: as one rename if it is new, else its two files renamed back to back once both are whole."""
    if names_file:
        raise FileError(f"{path}: PEFT's layout is a folder of two files; name a folder")
    config = json.dumps(dict(encoded.config or {}), indent=2, sort_keys=True)
    if not path.exists():
        with writing(path) as part:
            part.mkdir()
            (part / CONFIG_NAME).write_text(config, "utf-8")
            write_tensors(part / encoded.filename, encoded.tensors, encoded.metadata)
        return path
    with writing(path / encoded.filename) as weights, writing(path / CONFIG_NAME) as settings:
        settings.write_text(config, "utf-8")
        write_tensors(weights, encoded.tensors, encoded.metadata)
    return path
