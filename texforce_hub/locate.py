"""From a name to the file that it means: local paths, folders, catalogue names. Torch-free."""

import os
from collections.abc import Iterator
from pathlib import Path

from texforce_hub.catalog import Entry, read_catalog
from texforce_hub.container import open_header
from texforce_hub.dialects import plan
from texforce_hub.errors import DialectError, FileError, RefError
from texforce_hub.refs import AdapterRef

PREFERRED = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PICKLED = ("pytorch_lora_weights.bin", "adapter_model.bin", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".pth")
"""Files with these endings can hold an adapter."""

_COMPANIONS = ("optimizer", "scheduler", "random_states", "scaler", "training_args", "rng_state")


def find_file(ref: str | Path | AdapterRef) -> Path:
    """The one file that a reference means; a folder is searched as its layout asks.

    Raises:
        RefError: nothing of that name, or a folder in which no file or several could be meant.
    """
    place = find_place(ref)
    return pick_file(place) if place.is_dir() else place


def find_place(ref: str | Path | AdapterRef) -> Path:
    """The file or folder that a reference means: an existing path, else a catalogue entry's.

    Raises:
        RefError: nothing of that name here.
    """
    source = str(ref) if isinstance(ref, Path) else _parsed(ref).source
    if "\0" not in source and os.path.lexists(source):
        return Path(source)
    entry = None if isinstance(ref, Path) else read_catalog().get(source)
    if entry is not None:
        return _entry_folder(entry)
    raise RefError(_not_found(source))


def _parsed(ref: str | AdapterRef) -> AdapterRef:
    return AdapterRef.parse(ref) if isinstance(ref, str) else ref


def _entry_folder(entry: Entry) -> Path:
    if entry.folder is not None:
        if entry.folder.exists():
            return entry.folder
        raise RefError(f"catalogue entry {entry.name!r}: its weights are not in this installation ({entry.folder})")
    raise RefError(
        f"catalogue entry {entry.name!r} is on the Hub: download it first, "
        f"'hf download {entry.repo} --revision {entry.revision}', and give the folder"
    )


def _not_found(source: str) -> str:
    seen = f"{source!r} is no file or folder here"
    if source.startswith("hf://") or (source.count("/") >= 1 and not source.startswith((".", "/", "~"))):
        repo = source.removeprefix("hf://").partition("@")[0]
        return f"{seen}; if it is a Hub id, download it first, 'hf download {repo}', and give the folder"
    names = ", ".join(read_catalog()) or "none"
    return f"{seen} and no catalogue name (known: {names}); expected a path, or a name of the catalogue"


def pick_file(folder: Path) -> Path:
    """The adapter's file in a folder: the usual names in order, else the only file that holds one.

    Raises:
        RefError: no file, or several of equal standing.
    """
    for name in PREFERRED:
        if (folder / name).is_file():
            return folder / name
    adapters = [path for path in sorted(folder.glob("*.safetensors")) if _holds_adapter(path)]
    if len(adapters) > 1:
        raise RefError(f"{folder}: holds {len(adapters)} adapters, {_listed(adapters)}; name the one you mean")
    if adapters:
        return adapters[0]
    for name in PICKLED:
        if (folder / name).is_file():
            return folder / name
    raise RefError(f"{folder}: holds no adapter file; it holds {_listed(sorted(folder.iterdir())) or 'nothing'}")


def _holds_adapter(path: Path) -> bool:
    try:
        plan(open_header(path))
    except (FileError, DialectError):
        return False
    return True


def _listed(paths: list[Path]) -> str:
    names = [path.name + ("/" if path.is_dir() else "") for path in paths]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def find_files(ref: str | Path | AdapterRef) -> list[Path]:
    """Every file that a reference can mean: itself, or all tensor files of a folder and the folders in it.

    A trainer's optimizer states and hidden files are left out; links to folders are not followed.

    Raises:
        RefError: nothing of that name, or a folder without any.
    """
    place = find_place(ref)
    if not place.is_dir():
        return [place]
    found = list(_walk(place))
    if not found:
        seen = _listed(sorted(place.iterdir())) or "nothing"
        raise RefError(f"{place}: holds no tensor file ({', '.join(SUFFIXES)}); it holds {seen}")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.is_symlink():
                yield from _walk(path)
        elif path.suffix in SUFFIXES and not path.name.startswith(_COMPANIONS):
            yield path
