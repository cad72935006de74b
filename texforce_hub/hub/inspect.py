"""What a file says by its header alone, and its hash: layout, family, parts, ranks, alphas, problems."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from texforce_hub.arguments import check_path
from texforce_hub.errors import TexForceHubError
from texforce_hub.families.names import part_of
from texforce_hub.families.order import natural
from texforce_hub.files.container import sniff
from texforce_hub.files.hashing import hash_files
from texforce_hub.formats.plan.planning import Plan
from texforce_hub.hub.bundles import Bundle, bundle_file, plan_bundle
from texforce_hub.hub.sidecars import Sidecar, find_contradictions, find_sidecars
from texforce_hub.reading import file_size


@dataclass(frozen=True, slots=True)
class Inspection:
    """The facts of one file. With ``error`` set it is no readable adapter, and only what is known is filled in.

    ``families`` are the candidates, ``verdict`` says them in words, ``evidence`` why. ``parts``, ``ranks``,
    ``alphas``, ``kinds`` and ``dtypes`` count layers; an alpha of ``None`` means that the file stores none,
    ``None`` for all ``alphas`` that they stayed on the Hub. ``problems`` are one line each, ``notes`` say what was
    not looked at. ``sidecars`` are what lies beside it. An adapter in several files has ``files``, their names
    inside ``path`` or beside it with each one's SHA-256, and no hash of its own.
    """

    path: Path
    size: int = 0
    sha256: str = ""
    container: str = ""
    dialects: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    verdict: str = ""
    evidence: tuple[str, ...] = ()
    parts: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[int | None, int] = field(default_factory=dict)
    alphas: Mapping[float | None, int] | None = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)
    dtypes: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sidecars: tuple[Sidecar, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def autov2(self) -> str:
        """The short hash that model managers show: the first ten digits of the file's SHA-256."""
        return self.sha256[:10]

    @property
    def layers(self) -> int:
        """How many layers it changes."""
        return sum(self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
        plain["sidecars"] = [sidecar.as_dict() for sidecar in self.sidecars]
        return plain | {"path": str(self.path), "autov2": self.autov2, "layers": self.layers}


def inspect_file(source: str | Path | Bundle, *, hashed: bool = True) -> Inspection:
    """The facts of a file, adapter or not, or of an adapter in several; nothing in it is run, its tensors are hashed.

    With ``hashed=False`` no more than headers are read, and there is no hash.

    Raises:
        FileError: a file is not there, or cannot be opened. A damaged one gives its ``error``.

    Example:
        >>> from texforce_hub import inspect_file, read_adapter, write_adapter
        >>> path = write_adapter(read_adapter("shapes-colour"), "colour.safetensors")
        >>> inspect_file(path).layers
        12
    """
    bundle = source if isinstance(source, Bundle) else bundle_file(check_path(source, "source"))
    known = _identify(bundle, hashed=hashed)
    try:
        known = replace(known, container=", ".join(dict.fromkeys(sniff(path) for path in bundle.files)))
        planned = plan_bundle(bundle)
    except TexForceHubError as error:
        return with_error(known, str(error))
    return describe(known, planned)


def with_error(known: Inspection, error: str) -> Inspection:
    """What is known of a file that is no readable adapter, and why it is none."""
    return replace(known, error=error.removeprefix(f"{known.path}: "))


def _identify(bundle: Bundle, *, hashed: bool) -> Inspection:
    """What can be said of the files before they are understood: size, hashes, what lies beside them."""
    sizes = [file_size(path) for path in bundle.files]
    hashes = [hash_files([path]) if hashed else "" for path in bundle.files]
    known = Inspection(bundle.path, sum(sizes), sidecars=find_sidecars(bundle.as_one_file))
    if bundle.is_one_file:
        return replace(known, sha256=hashes[0])
    folder = bundle.path if bundle.path.is_dir() else bundle.path.parent
    names = [str(path.relative_to(folder)) for path in bundle.files]
    return replace(known, files=dict(zip(names, hashes, strict=True)))


def describe(known: Inspection, planned: Plan) -> Inspection:
    """The facts of an adapter of which so much is ``known``, from what is planned of it."""
    layers = planned.layers.values()
    families = planned.family.candidates
    return replace(
        known,
        dialects=planned.dialects,
        families=families,
        verdict=planned.family.summary,
        evidence=planned.family.evidence,
        parts=dict(Counter(sorted((part_of(layer.name) for layer in layers), key=natural))),
        ranks=_counted(layer.rank for layer in layers),
        alphas=_counted(layer.alpha for layer in layers),
        kinds=_counted(("DoRA" if layer.decomposed else layer.kind) or "unreadable" for layer in layers),
        dtypes=_counted(layer.dtype for layer in layers),
        metadata=dict(planned.metadata),
        extras=planned.extras,
        problems=(*planned.problems, *_sidecar_problems(known, families)),
        error=planned.faults[0] if planned.faults else None,
    )


def _sidecar_problems(known: Inspection, families: Sequence[str]) -> Iterator[str]:
    for sidecar in known.sidecars:
        if sidecar.problem is not None:
            yield f"{sidecar.path.name} is unreadable: {sidecar.problem}"
        for contradiction in find_contradictions(sidecar, families, known.sha256):
            yield f"{sidecar.path.name} {contradiction}"


T = TypeVar("T")


def _counted(values: Iterator[T]) -> dict[T, int]:
    return dict(Counter(values).most_common())
