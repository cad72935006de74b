"""A PEFT adapter's folder: weights and a configuration that make no sense without each other."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from torch import Tensor

from texforce_hub.errors import DialectError, FileError
from texforce_hub.files.container import open_header
from texforce_hub.files.header import CONFIG_NAME
from texforce_hub.files.leftovers import name_part, remove_leftovers
from texforce_hub.files.writing import write_stream, writing
from texforce_hub.formats.codec.decoding import check_plan
from texforce_hub.formats.codec.encoding import Encoded
from texforce_hub.formats.peft_config import owns_config
from texforce_hub.formats.plan.planning import plan
from texforce_hub.hub.filenames import is_candidate, list_names
from texforce_hub.reading import is_there

_ASIDE = ".old"


def write_folder(encoded: Encoded, tensors: Iterable[tuple[str, Tensor]], path: Path) -> Path:
    """Write a configuration and its weights: as one rename if the folder is new, else they change together.

    A killed writer leaves no folder, the old adapter, none, or the new one; never weights beside a configuration
    that is not theirs.

    Raises:
        FileError: the place cannot be written, is a file, or holds other weights, to which the new configuration
            would seem to belong.
        DialectError: what would be written could not be read again.
    """
    if not is_there(path):
        return _write_new_folder(encoded, tensors, path)
    _refuse_other_weights(path, encoded.filename)
    remove_leftovers(path)
    staged = path / name_part(path.name)
    try:
        _write_new_folder(encoded, tensors, staged)
        _replace_together(staged, path, (CONFIG_NAME, encoded.filename))
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return path


def _write_new_folder(encoded: Encoded, tensors: Iterable[tuple[str, Tensor]], path: Path) -> Path:
    with writing(path) as part:
        part.mkdir()
        (part / CONFIG_NAME).write_text(json.dumps(dict(encoded.config or {}), indent=2, sort_keys=True), "utf-8")
        weights = part / encoded.filename
        write_stream(
            weights, encoded.tensors, tensors, encoded.metadata, check=partial(check_readable, owns_config=True)
        )
    return path


def check_readable(path: Path, *, owns_config: bool = False) -> None:
    """Refuse a file, before it takes its place, that could not be read again: what it says is no adapter's.

    Raises:
        DialectError: says why not.
    """
    try:
        header = open_header(path)
        check_plan(plan(header, owns_config=owns_config), header.tensors)
    except (FileError, DialectError) as error:
        reason = str(error).replace(f"{path}: ", "")
        raise DialectError(f"it could not be read again: {reason}; nothing is written") from error


def _refuse_other_weights(path: Path, filename: str) -> None:
    """Other files of weights in a PEFT folder would be read with the new configuration."""
    if not path.is_dir():
        raise FileError(f"{path}: is a file; PEFT's layout is a folder of two files, name a folder")
    others = [file.name for file in path.iterdir() if owns_config(file.name)]
    others = sorted(name for name in others if name != filename and is_candidate(name))
    if others:
        raise FileError(
            f"{path}: holds {list_names(others)}, weights that the new configuration does not belong to; "
            "remove them, or write to another folder"
        )


def _replace_together(staged: Path, folder: Path, names: Sequence[str]) -> None:
    """Move the files of these names from ``staged`` into ``folder``, which may hold others of the same names.

    Old ones are taken away from the last name to the first, and new ones come from the first to the last: whoever
    needs the last file sees all of the old, nothing, or all of the new. Both folders lie on one file system; if a
    file cannot be moved, the old ones come back.

    Raises:
        OSError: a file cannot be moved.
    """
    try:
        for name in reversed(names):
            if os.path.lexists(folder / name):
                (folder / name).replace(staged / f"{name}{_ASIDE}")
        for name in names:
            (staged / name).replace(folder / name)
    except BaseException:
        _put_back(staged, folder, names)
        raise


def _put_back(staged: Path, folder: Path, names: Sequence[str]) -> None:
    if not (staged / names[-1]).exists():
        return  # all of the new is there
    with suppress(OSError):
        for name in names:
            if os.path.lexists(staged / f"{name}{_ASIDE}"):
                (staged / f"{name}{_ASIDE}").replace(folder / name)
            elif not (staged / name).exists():
                (folder / name).unlink(missing_ok=True)
