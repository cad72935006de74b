"""An adapter from one layout into another, or many of them, each whole or not at all."""

import filecmp
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from texforce_hub.adapter.lazy import LazyAdapter
from texforce_hub.device import spell_dtype
from texforce_hub.errors import ConfigError, FileError, TexForceHubError
from texforce_hub.families import find_family
from texforce_hub.families.recognition import FAMILY_CLAIMS
from texforce_hub.files.writing import writing
from texforce_hub.formats.codec.fitting import fit_reader
from texforce_hub.formats.codec.spelling import find_writable
from texforce_hub.formats.readers import find_reader
from texforce_hub.hub.bundles import Bundle
from texforce_hub.hub.cache import hub_id_of
from texforce_hub.hub.filenames import PICKLED, PREFERRED, SUFFIXES, check_name, is_safetensors
from texforce_hub.hub.find import find_bundle, find_bundles, find_path
from texforce_hub.hub.read import naming, open_adapter
from texforce_hub.hub.refs.adapter import WHOLE, AdapterRef
from texforce_hub.hub.sidecars import Sidecar, find_sidecars, leads_away
from texforce_hub.hub.stack import check_patterns
from texforce_hub.hub.write import write_adapter
from texforce_hub.reading import is_folder, is_there

_LOG = logging.getLogger("texforce_hub")

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
"""The dtypes that a converted file can have, by name; without one, tensors keep theirs."""


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter to convert: its files, where it goes, and the reference whose weights it gets."""

    source: Bundle
    target: Path
    weights: AdapterRef | None = None


@dataclass(frozen=True, slots=True)
class Conversion:
    """One adapter's conversion: where it went, or why not, and what there is to say of its sidecars."""

    source: Path
    output: Path
    error: str | None = None
    notes: tuple[str, ...] = ()


def convert_adapter(
    ref: str | Path | AdapterRef,
    output: str | Path,
    *,
    dialect: str = "diffusers",
    reader: str | None = None,
    family: str | None = None,
    dtype: str | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
    sidecars: bool = True,
) -> Path:
    """Read an adapter and write it in another layout; gives the file or folder written.

    It goes from file to file layer by layer: memory stays at the largest few, whatever the file's size. ``alpha``
    is that of every layer which stores none; ``allow_pickle`` is needed for pickles from the Hub. What lies beside
    the adapter is copied, see :func:`carry_sidecars`. A reference's weights (``cat:0.5``) go into the file.
    ``reader`` (``a1111``, ``comfyui``, ``forge``, ``diffusers``, ``peft``) chooses the layout, and an adapter that this
    program would not read exactly is refused; ``family`` is the one meant where the layers fit several.

    Raises:
        ConfigError: no such dtype, reader or family; a family that the layers do not fit; a reference with a window,
            or a weight of a part that the adapter lacks.
        RefError, FileError, DialectError, AdapterError: as reading and writing raise them; nothing is left then.

    Example:
        >>> from texforce_hub import convert_adapter
        >>> convert_adapter("shapes-colour", "colour-kohya.safetensors", dialect="kohya").name
        'colour-kohya.safetensors'
    """
    done = convert_bundle(
        find_bundle(ref, allow_pickle=allow_pickle),
        Path(output),
        weights=parse_weights(ref),
        dialect=dialect,
        reader=reader,
        family=family,
        dtype=dtype,
        alpha=alpha,
        allow_pickle=allow_pickle,
        sidecars=sidecars,
    )
    for note in done.notes:
        _LOG.warning("note: %s", note)
    return done.output


def convert_bundle(
    bundle: Bundle,
    output: Path,
    *,
    weights: AdapterRef | None = None,
    dialect: str = "diffusers",
    reader: str | None = None,
    family: str | None = None,
    dtype: str | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
    sidecars: bool = True,
) -> Conversion:
    """As :func:`convert_adapter`, of the files that are known to be the adapter's; it tells its notes.

    Raises:
        ConfigError, FileError, DialectError, AdapterError: as :func:`convert_adapter`.
    """
    chosen = _dtype(dtype)
    check_name(output)
    adapter = open_adapter(bundle, alpha=alpha, allow_pickle=allow_pickle)
    if family is not None:
        adapter = _meant_for(adapter, family)
    if weights is not None:
        check_patterns(weights.label, adapter.outline, weights)
        adapter = adapter.weighted(weights.weight_of)
    if reader is not None:
        with naming(bundle.path):
            adapter, dialect = fit_reader(adapter, find_reader(reader))
    filename = find_writable(dialect).filename
    there = [path for path in (output, output / filename) if is_there(path)]
    if any(path.samefile(file) for path in there for file in bundle.files):
        raise FileError(f"{output}: is the adapter that was read; write somewhere else")
    written = write_adapter(adapter, output, dialect=dialect, dtype=chosen)
    target = _tensors_file(written, filename)
    return Conversion(bundle.path, written, notes=_bring_sidecars(bundle.as_one_file, target) if sidecars else ())


def _meant_for(adapter: LazyAdapter, family: str) -> LazyAdapter:
    """The adapter, whose header says this family and no other.

    Raises:
        FamilyError: there is no such family.
        ConfigError: its layers do not fit it.
    """
    find_family(family)
    kept = {k: v for k, v in adapter.outline.metadata.items() if k not in FAMILY_CLAIMS}
    meant = replace(adapter.outline, metadata=kept | {"texforce_hub.family": family})
    if meant.family_verdict.family != family:
        summary = adapter.outline.family_verdict.summary
        raise ConfigError(f"--family {family}: the layers are {summary}; leave it out, or name a family that they fit")
    return replace(adapter, outline=meant)


def _tensors_file(written: Path, filename: str) -> Path:
    """The file after which what lies beside an adapter is named: its only one, or one beside a folder of folders."""
    if not written.is_dir():
        return written
    tensors = written / filename
    return tensors if tensors.is_file() else Bundle(written, ()).as_one_file


def _bring_sidecars(source: Path, target: Path) -> tuple[str, ...]:
    """As :func:`carry_sidecars`, also of an adapter from the Hub: the cache holds only what was asked for."""
    origin = hub_id_of(source)
    if origin is None:
        return carry_sidecars(source, target)
    from texforce_hub.hub.remote import fetch_sidecars

    return (*fetch_sidecars(origin), *carry_sidecars(source, target))


def carry_sidecars(source: Path, target: Path) -> tuple[str, ...]:
    """Copy what lies beside one adapter's file to beside another's, under its stem; gives what there is to say.

    Each copy is whole or not there, and nothing is written over: where another file has the name already, it
    stays and the note says so. Nothing in a sidecar is changed, though what it says of a file's hash is true of the
    old file only. A sidecar that cannot be copied is noted and stops nothing: the adapter is what matters.
    """
    return tuple(note for sidecar in find_sidecars(source) for note in _carry(sidecar, target))


def _carry(sidecar: Sidecar, target: Path) -> Iterator[str]:
    copy = target.with_name(target.stem + sidecar.ending)
    if leads_away(sidecar.path):
        yield f"{sidecar.path}: not copied: {sidecar.problem}"
        return
    try:
        if copy.exists() or copy.is_symlink():
            if not copy.is_file() or not filecmp.cmp(copy, sidecar.path, shallow=False):
                yield f"{copy}: another file of that name is there already, and it stays as it is"
            return
        with writing(copy) as part:
            shutil.copyfile(sidecar.path, part)
    except (FileError, OSError) as error:
        yield f"{sidecar.path}: not copied: {error}"
        return
    if sidecar.sha256:
        yield (
            f"{copy}: copied as it was; the SHA-256 in it is that of the old file, "
            "so managers that look a file up by its hash will not find this one"
        )


def parse_weights(ref: str | Path | AdapterRef) -> AdapterRef | None:
    """The reference that has a user's weights; ``None`` where there are none.

    Raises:
        RefError: the text is no reference.
        ConfigError: it has a window, which no file can hold.
    """
    if isinstance(ref, Path):
        return None
    parsed = AdapterRef.parse(ref) if isinstance(ref, str) else ref
    if parsed.window != WHOLE:
        raise ConfigError(f"{parsed}: a window needs the denoising steps, a file holds for all of them; leave it out")
    return parsed if parsed.parts or parsed.weight != 1.0 else None


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
    _dtype(dtype)
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


def _dtype(name: str | None) -> torch.dtype | None:
    known = None if name is None else spell_dtype(name)
    if known is not None and known not in DTYPES:
        raise ConfigError(f"no dtype {name!r}; known: {', '.join(DTYPES)}")
    return None if known is None else DTYPES[known]
