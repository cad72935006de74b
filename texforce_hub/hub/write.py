"""Write an adapter as a file or a folder of one layout."""

import logging
from pathlib import Path

import torch

from texforce_hub.adapter.finite import check_finite
from texforce_hub.adapter.lazy import LazyAdapter, check_is_adapter
from texforce_hub.adapter.value import Adapter
from texforce_hub.arguments import check_path
from texforce_hub.device import Dtype, given_dtype
from texforce_hub.errors import FileError
from texforce_hub.files.writing import write_stream, writing
from texforce_hub.formats.codec.encoding import encode, encode_lazily
from texforce_hub.hub.filenames import SUFFIXES, check_name, is_safetensors
from texforce_hub.hub.peft_folder import check_readable, write_folder
from texforce_hub.reading import is_folder, is_there

_LOG = logging.getLogger("texforce_hub")


def write_adapter(
    adapter: Adapter | LazyAdapter,
    path: str | Path,
    *,
    dialect: str = "diffusers",
    dtype: Dtype | None = None,
) -> Path:
    """Write an adapter in one layout, whole or not at all; gives the file, or the folder of a PEFT adapter.

    ``path`` is a ``.safetensors`` file, or a folder, in which the file gets its layout's usual name. A stored
    adapter goes from file to file layer by layer. PEFT's layout of several parts is a new folder, with a folder for
    each of them (``text_encoder``, ``unet`` …), which is read as one adapter again.

    Raises:
        DialectError: the layout is unknown, or cannot hold some layer, or what would be written could not be read.
        AdapterError: NaN or infinity, or numbers that the dtype cannot hold.
        FileError: the place cannot be written or names a pickle, a PEFT adapter shall be a file, or one of several
            parts lie in a folder that exists.
        ConfigError: something else than an adapter, or no dtype of this name.

    Example:
        >>> from texforce_hub import read_adapter, write_adapter
        >>> write_adapter(read_adapter("shapes-colour"), "colour.safetensors").name
        'colour.safetensors'
    """
    check_is_adapter(adapter)
    path, kind = check_path(path), given_dtype(dtype)
    check_name(path)
    if path.suffix.lower() in SUFFIXES and not is_safetensors(path.name) and not is_folder(path):
        raise FileError(f"{path}: pickles are not written; name a .safetensors file, or a folder")
    if isinstance(adapter, Adapter):
        check_finite(adapter)
    if dialect == "peft" and len(_outline_of(adapter).parts) > 1:
        return _write_parts(adapter, path, kind)
    if isinstance(adapter, LazyAdapter):
        encoded, tensors = encode_lazily(adapter, dialect, dtype=kind)
    else:
        encoded = encode(adapter, dialect, dtype=kind)
        tensors = iter(encoded.tensors.items())
    names_file = is_safetensors(path.name) and not is_folder(path)
    if encoded.config is not None:
        if names_file:
            raise FileError(f"{path}: PEFT's layout is a folder of two files; name a folder")
        return write_folder(encoded, tensors, path)
    file = path if names_file else path / encoded.filename
    return write_stream(file, encoded.tensors, tensors, encoded.metadata, check=check_readable)


def _outline_of(adapter: Adapter | LazyAdapter) -> Adapter:
    return adapter.outline if isinstance(adapter, LazyAdapter) else adapter


def _write_parts(adapter: Adapter | LazyAdapter, path: Path, dtype: torch.dtype | None) -> Path:
    """A PEFT folder for each part, all of them or none."""
    parts = _outline_of(adapter).parts
    if is_there(path) or is_safetensors(path.name):
        raise FileError(
            f"{path}: in PEFT's layout, {', '.join(parts)} are a folder each; name a new folder for them to lie in"
        )
    if adapter.extras:
        _LOG.warning("peft: %d extra tensors have no place in this layout", len(adapter.extras))
    with writing(path) as staged:
        for part in parts:
            write_adapter(adapter.only(part), staged / part, dialect="peft", dtype=dtype)
    return path
