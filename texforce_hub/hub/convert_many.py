"""Many adapters into another layout: where each goes, and one that fails stops no other."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from texforce_hub.errors import FileError, TexForceHubError
from texforce_hub.hub.bundles import Bundle
from texforce_hub.hub.cache import hub_id_of
from texforce_hub.hub.convert import Conversion, convert_bundle, parse_weights, pick_dtype
from texforce_hub.hub.filenames import PICKLED, PREFERRED, SUFFIXES, is_safetensors
from texforce_hub.hub.find import find_bundles, find_path
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.reading import is_folder

_LOG = logging.getLogger("texforce_hub")


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter to convert: its files, where it goes, and the reference whose weights it gets."""

    source: Bundle
    target: Path
    weights: AdapterRef | None = None


def plan_conversions(refs: Sequence[str | Path], output: Path, dialect: str) -> list[Job]:
    """Every adapter that the references mean, and where under ``output`` it goes; a folder's inner folders are kept.

    Where several would take one name (``cat.safetensors`` beside ``cat.pt``), the safetensors file takes it, and
    each other file keeps its whole name (``cat.pt.safetensors``).

    Raises:
        RefError: a reference means nothing.
        ConfigError: a reference has a window.
        FileError: ``output`` is named as a file is.
    """
    if output.suffix.lower() in SUFFIXES and not is_folder(output):
        raise FileError(f"{output}: names a file; several adapters are written into a folder, name one")
    jobs = list(dict.fromkeys(job for ref in refs for job in _jobs(ref, output, dialect)))
    wanted = Counter(_as_one(job.target) for job in jobs)
    return [
        replace(job, target=_apart(job.source, job.target)) if wanted[_as_one(job.target)] > 1 else job for job in jobs
    ]


def _apart(source: Bundle, target: Path) -> Path:
    if not source.is_one_file or is_safetensors(source.path.name):
        return target
    return target.with_name(source.path.name + target.name.removeprefix(source.stem))


def _as_one(target: Path) -> str:
    """Two places with one such text can be one file: many file systems do not tell capitals apart."""
    return str(target).casefold()


def convert_all(
    jobs: Sequence[Job], *, force: bool = True, dtype: str | None = None, **options: Any
) -> Iterator[Conversion]:
    """Convert one by one, with the options of :func:`convert_bundle`; an error stops one, and the others go on.

    Adapters that would become one file are errors, each of them: none is written. Without ``force`` nothing is
    written over what is there.
    """
    pick_dtype(dtype)
    taken: dict[Path, list[Path]] = {}
    for job in jobs:
        taken.setdefault(job.target, []).append(job.source.path)
    for job in jobs:
        if len(taken[job.target]) > 1:
            names = " and ".join(map(str, taken[job.target]))
            error = f"{names} would become one file, {job.target}; convert them apart"
            yield Conversion(job.source.path, job.target, error)
            continue
        if not force and os.path.lexists(job.target):
            error = f"{job.target} exists; name another folder, or give --force to write over it"
            yield Conversion(job.source.path, job.target, error)
            continue
        yield _convert_safely(job, dtype=dtype, **options)


def _convert_safely(job: Job, **options: Any) -> Conversion:
    source, target = job.source, job.target
    try:
        return convert_bundle(source, target, weights=job.weights, **options)
    except TexForceHubError as error:
        return Conversion(source.path, target, str(error))
    except Exception as error:  # noqa: BLE001  # whatever one file does, the hundreds after it are converted
        _LOG.debug("%s", source.path, exc_info=True)
        return Conversion(source.path, target, f"{source.path}: unexpected {type(error).__name__}: {error}")


def _jobs(ref: str | Path, output: Path, dialect: str) -> Iterator[Job]:
    weights, root = parse_weights(ref), find_path(ref)
    for source in find_bundles(ref):
        inside = source.path.relative_to(root).parent if is_folder(root) else Path()
        stem = _folder_name(root) if is_folder(root) and is_usual(source, root) else source.stem
        yield Job(source, output / inside / (stem if dialect == "peft" else f"{stem}.safetensors"), weights)


def is_usual(source: Bundle, root: Path) -> bool:
    """Whether an adapter in a folder is the folder's own: its files have the usual names, which say nothing of it."""
    return source.path == root or (source.path.parent == root and source.path.name in (*PREFERRED, *PICKLED))


def _folder_name(root: Path) -> str:
    """What a folder is called: in a Hub cache by its repository."""
    origin = hub_id_of(root)
    if origin is None:
        return root.absolute().name
    return PurePosixPath(origin.file or origin.repo).name
