"""A reference to an adapter: its files are found, their headers planned, their bytes decoded here."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from texforce_hub.adapter.finite import check_finite, is_finite
from texforce_hub.adapter.lazy import LazyAdapter
from texforce_hub.adapter.value import Adapter, Layer
from texforce_hub.errors import AdapterError, DialectError
from texforce_hub.files.header import Header
from texforce_hub.files.lazy_mapping import LazyMapping
from texforce_hub.files.tensors import TensorFile
from texforce_hub.files.torch_dtypes import DTYPES
from texforce_hub.formats.codec.decoding import check_plan, decode, decode_lazily
from texforce_hub.formats.codec.joining import join_lazy
from texforce_hub.formats.plan.joining import join_plans
from texforce_hub.formats.plan.planning import Plan
from texforce_hub.hub.bundles import Bundle, Piece, check_shards, join_headers, plan_opened
from texforce_hub.hub.cache import is_in_hub_cache
from texforce_hub.hub.find import find_bundle
from texforce_hub.hub.pickles import are_pickles_permitted
from texforce_hub.hub.refs.adapter import AdapterRef

_LOG = logging.getLogger("texforce_hub")
_MOST_NOTES = 8
_LONGEST_NOTE = 300  # characters


def read_adapter(
    source: str | Path | AdapterRef | Bundle,
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

    Example:
        >>> from texforce_hub import read_adapter
        >>> adapter = read_adapter("shapes-colour")
        >>> adapter.family, len(adapter.layers)
        ('shapes', 12)
    """
    bundle = _find(source, allow_pickle=allow_pickle)
    if len(bundle.pieces) == 1:
        adapter = _read_piece(bundle, alpha=alpha, allow_pickle=allow_pickle)
    else:
        lazy = open_adapter(bundle, alpha=alpha, allow_pickle=allow_pickle, checked=False, aloud=True)
        with naming(bundle.path):
            adapter = replace(lazy.outline, layers=dict(lazy.layers), extras=dict(lazy.extras))
    with naming(bundle.path):
        check_finite(adapter)  # before anything moves: a number that lies on a device has to be waited for
        return adapter if device is None else adapter.to(device)


def _read_piece(bundle: Bundle, *, alpha: float | None, allow_pickle: bool) -> Adapter:
    """The adapter of a bundle of one piece: its files are opened once, read by one look each, and closed."""
    (piece,) = bundle.pieces
    with ExitStack() as opened:
        files = [opened.enter_context(file) for file in _open_files(piece, allow_pickle=allow_pickle)]
        header = join_headers(piece.paths, [file.header for file in files])
        with naming(piece.paths[0]):
            planned = plan_opened(piece, header)
            check_plan(planned, header.tensors)
            _check_dtypes(header)
        tensors = {name: tensor for file in files for name, tensor in file.read_all().items()}
    with naming(piece.paths[0]):
        adapter = decode(planned, tensors, alpha=alpha)
    _warn(bundle, planned.notes)
    return adapter


def open_adapter(
    source: str | Path | AdapterRef | Bundle,
    *,
    device: str | torch.device | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
    checked: bool = True,
    aloud: bool | None = None,
) -> LazyAdapter:
    """As :func:`read_adapter`, of an adapter that stays in its files: layers are read when they are looked at.

    Nothing but headers is read here. ``checked``: looking at a layer that holds NaN or infinity raises; without, for
    an outline or to measure it, they may be among its numbers.
    ``aloud`` (by default as ``checked``): what is worth knowing of it goes to the log.

    Raises:
        RefError, FileError, DialectError, AdapterError: as :func:`read_adapter`, as far as headers tell.
    """
    bundle = _find(source, allow_pickle=allow_pickle)
    plans: dict[str, Plan] = {}
    pieces: dict[str, LazyAdapter] = {}
    for piece in bundle.pieces:
        header, tensors = _open_piece(piece, device, allow_pickle=allow_pickle)
        name = bundle.name_of(piece)
        with naming(piece.paths[0]):
            plans[name] = plan_opened(piece, header)
            pieces[name] = decode_lazily(plans[name], _outlines(header), tensors, alpha=alpha)
    with naming(bundle.path):
        whole = join_plans(plans)
        lazy = pieces.popitem()[1] if len(pieces) == 1 else join_lazy(whole, pieces, alpha=alpha)
    if checked if aloud is None else aloud:
        _warn(bundle, whole.notes)
    return _watched(lazy, bundle.path) if checked else lazy


def _watched(lazy: LazyAdapter, path: Path) -> LazyAdapter:
    """The same adapter, each layer of it checked when it is read: no tensor is read for the check alone."""

    def look(name: str) -> Layer:
        with naming(path):
            layer = lazy.layers[name]
            if not is_finite(layer):
                check_finite(lazy)  # counts them
            return layer

    return replace(lazy, layers=LazyMapping(lazy.layers, look))


def _find(source: str | Path | AdapterRef | Bundle, *, allow_pickle: bool) -> Bundle:
    return source if isinstance(source, Bundle) else find_bundle(source, allow_pickle=allow_pickle)


def _warn(bundle: Bundle, notes: Sequence[str]) -> None:
    """Nothing of a file is left out, or read otherwise than it says, without a word."""
    for note in notes[:_MOST_NOTES]:
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in note[:_LONGEST_NOTE])
        _LOG.warning("%s: %s%s", bundle.path, shown, "…" if len(note) > _LONGEST_NOTE else "")
    if len(notes) > _MOST_NOTES:
        _LOG.warning("%s: %d notes more; texforce-hub inspect lists them", bundle.path, len(notes) - _MOST_NOTES)


def _open_piece(
    piece: Piece, device: str | torch.device | None, *, allow_pickle: bool
) -> tuple[Header, Mapping[str, Tensor]]:
    """The header of a file, or of all its shards, and its tensors, to be read when they are asked for.

    The files stay open as long as the tensors are used, so that what is read is what was checked.
    """
    files = list(_open_files(piece, allow_pickle=allow_pickle))
    owners = {name: file for file in files for name in file.header.tensors}
    header = join_headers(piece.paths, [file.header for file in files])
    return header, LazyMapping(owners, lambda name: owners[name].read(name).to(device or "cpu"))


def _open_files(piece: Piece, *, allow_pickle: bool) -> Iterator[TensorFile]:
    """The files of a piece, each opened once."""
    check_shards(piece)
    for path in piece.paths:
        yield TensorFile(path, allow_pickle=allow_pickle or are_pickles_permitted() or not is_in_hub_cache(path))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say in an error which file it is about."""
    try:
        yield
    except (DialectError, AdapterError) as error:
        raise type(error)(f"{path}: {error}") from error


def _outlines(header: Header) -> dict[str, Tensor]:
    _check_dtypes(header)
    return {
        name: torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta") for name, info in header.tensors.items()
    }


def _check_dtypes(header: Header) -> None:
    for name, info in header.tensors.items():
        if info.dtype not in DTYPES:
            raise DialectError(f"tensor {name!r} has dtype {info.dtype}, which torch cannot hold; convert it")
