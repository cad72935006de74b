"""An adapter from one layout into another, or many of them, each whole or not at all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from texforce_hub.dialects import DIALECTS
from texforce_hub.errors import ConfigError, DialectError, FileError, TexForceHubError
from texforce_hub.locate import find_file, find_files, find_place
from texforce_hub.refs import AdapterRef
from texforce_hub.sources import open_adapter, write_adapter

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
"""The dtypes that a converted file can have, by name; without one, tensors keep theirs."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """One file's conversion: where it went, or why not."""

    source: Path
    output: Path
    error: str | None = None


def convert_adapter(
    ref: str | Path | AdapterRef,
    output: str | Path,
    *,
    dialect: str = "diffusers",
    dtype: str | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
) -> Path:
    """Read an adapter and write it in another layout; gives the file or folder written.

    It goes from file to file layer by layer: memory stays at the largest few, whatever the file's size. ``alpha``
    is that of every layer which stores none; ``allow_pickle`` is needed for pickles from the Hub.

    Raises:
        ConfigError: no such dtype.
        RefError, FileError, DialectError, AdapterError: as reading and writing raise them; nothing is left then.
    """
    source, target, chosen = find_file(ref), Path(output), _dtype(dtype)
    if dialect not in DIALECTS:
        raise DialectError(f"no dialect {dialect!r}; known: {', '.join(DIALECTS)}")
    adapter = open_adapter(source, alpha=alpha, allow_pickle=allow_pickle)
    if any(place.exists() and place.samefile(source) for place in (target, target / DIALECTS[dialect].filename)):
        raise FileError(f"{output}: is the adapter that was read; write somewhere else")
    return write_adapter(adapter, target, dialect=dialect, dtype=chosen)


def plan_conversions(refs: Sequence[str | Path], output: Path, dialect: str) -> list[tuple[Path, Path]]:
    """Every file that the references mean, and where under ``output`` it goes; a folder's inner folders are kept.

    Raises:
        RefError: a reference means nothing.
        FileError: two files would become one.
    """
    pairs = [pair for ref in refs for pair in _targets(ref, output, dialect)]
    taken: dict[Path, Path] = {}
    for source, target in pairs:
        if taken.setdefault(target, source) != source:
            raise FileError(f"{source} and {taken[target]} would both become {target}; convert them apart")
    return list(dict.fromkeys(pairs))


def convert_all(
    pairs: Sequence[tuple[Path, Path]],
    *,
    dialect: str,
    dtype: str | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
) -> Iterator[Conversion]:
    """Convert file by file; one that cannot be converted gives its error, and the others go on."""
    _dtype(dtype)
    for source, target in pairs:
        try:
            written = convert_adapter(
                source, target, dialect=dialect, dtype=dtype, alpha=alpha, allow_pickle=allow_pickle
            )
        except TexForceHubError as error:
            yield Conversion(source, target, str(error))
        else:
            yield Conversion(source, written)


def _targets(ref: str | Path, output: Path, dialect: str) -> Iterator[tuple[Path, Path]]:
    place = find_place(ref)
    for source in find_files(ref):
        inside = source.relative_to(place) if place.is_dir() else Path(source.name)
        name = inside.stem if dialect == "peft" else f"{inside.stem}.safetensors"
        yield source, output / inside.parent / name


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ConfigError(f"no dtype {name!r}; known: {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]
