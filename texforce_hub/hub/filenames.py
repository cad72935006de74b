"""Which of a folder's files is the adapter, by their names: the same order here and on the Hub."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from texforce_hub.errors import FileError, RefError
from texforce_hub.formats.peft_config import PICKLED_WEIGHTS, WEIGHTS

PREFERRED = ("pytorch_lora_weights.safetensors", WEIGHTS)
PICKLED = ("pytorch_lora_weights.bin", PICKLED_WEIGHTS, "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".pth")
"""Files with these endings, in capitals or not, can hold an adapter."""

_LONGEST_NAME = 255  # bytes
_COMPANIONS = ("optimizer", "scheduler", "random_states", "scaler", "training_args", "rng_state")


class NoAdapterError(RefError):
    """A folder has no adapter file itself; the folders in it may."""


def choose_only(paths: Sequence[str], where: str, error: NoAdapterError) -> str:
    """The only adapter in the folders of a folder that has none itself.

    Raises:
        RefError: there are several, or, as ``error`` says, none.
    """
    if len(paths) > 1:
        many = f"holds no adapter itself, and {len(paths)} in its folders"
        raise RefError(f"{where}: {many}, {list_names(paths)}; name the one you mean") from error
    if not paths:
        raise error
    return paths[0]


def choose_name(names: Sequence[str], holds_adapter: Callable[[str], bool], where: str) -> str:
    """The adapter's file among a folder's: the usual names in order, else the only one that holds an adapter.

    ``names`` are relative to the folder; files of folders in it are no candidates. ``where`` is for errors.

    Raises:
        NoAdapterError: no file.
        RefError: several of equal standing.
    """
    for name in PREFERRED:
        if name in names:
            return name
    own = [name for name in names if "/" not in name]
    adapters = [name for name in own if is_safetensors(name) and holds_adapter(name)]
    if len(adapters) > 1:
        raise RefError(f"{where}: holds {len(adapters)} adapters, {list_names(adapters)}; name the one you mean")
    if adapters:
        return adapters[0]
    for name in PICKLED:
        if name in names:
            return name
    raise NoAdapterError(f"{where}: holds no adapter file; it holds {list_names(names) or 'nothing'}")


def is_candidate(name: str) -> bool:
    """Whether a file of this path can hold an adapter: not a trainer's own states, nothing hidden."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden and not path.name.startswith(_COMPANIONS)


def is_safetensors(name: str) -> bool:
    """Whether a file of this name should be a safetensors file; some systems write endings in capitals."""
    return name.lower().endswith(".safetensors")


def check_name(path: Path) -> None:
    """Refuse a path of which no file system takes a part: 255 bytes are the most, and a letter can have four.

    Raises:
        FileError: names it.
    """
    for name in path.parts:
        size = len(os.fsencode(name))
        if size > _LONGEST_NAME:
            raise FileError(f"{name[:40]}…: a name of {size} bytes; file systems take {_LONGEST_NAME}, shorten it")


def list_names(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
