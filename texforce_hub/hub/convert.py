"""An adapter from one layout into another, whole or not at all."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from texforce_hub import device
from texforce_hub.adapter.lazy import LazyAdapter
from texforce_hub.arguments import check_path
from texforce_hub.errors import ConfigError, FileError
from texforce_hub.families import find_family
from texforce_hub.families.recognition import FAMILY_CLAIMS
from texforce_hub.formats.codec.fitting import fit_reader
from texforce_hub.formats.codec.spelling import find_writable
from texforce_hub.formats.readers import find_reader
from texforce_hub.hub.bundles import Bundle
from texforce_hub.hub.filenames import check_name
from texforce_hub.hub.find import find_bundle
from texforce_hub.hub.read import naming, open_adapter
from texforce_hub.hub.refs.adapter import WHOLE, AdapterRef
from texforce_hub.hub.sidecar_copies import bring_sidecars
from texforce_hub.hub.stack import check_patterns
from texforce_hub.hub.write import write_adapter
from texforce_hub.reading import is_there

_LOG = logging.getLogger("texforce_hub")

DTYPES = {**device.DTYPES, "float8_e4m3": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""The dtypes that a converted file can have, by name; without one, tensors keep theirs."""


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
    the adapter is copied, and never over what is there. A reference's weights (``cat:0.5``) go into the file.
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
        check_path(output, "output"),
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
    chosen = pick_dtype(dtype)
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
    return Conversion(bundle.path, written, notes=bring_sidecars(bundle.as_one_file, target) if sidecars else ())


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


def pick_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name, in any of its spellings; ``None`` keeps each tensor's.

    Raises:
        ConfigError: files are not converted to it.
    """
    known = None if name is None else device.spell_dtype(name)
    if known is not None and known not in DTYPES:
        raise ConfigError(f"no dtype {name!r}; known: {', '.join(DTYPES)}")
    return None if known is None else DTYPES[known]
