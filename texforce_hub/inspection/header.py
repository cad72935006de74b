"""What a file says without any of its tensors being read: layout, family, parts, ranks, alphas, hash, problems."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from texforce_hub.container import open_header, sniff
from texforce_hub.dialects import Plan, plan
from texforce_hub.errors import FileError, TexForceHubError
from texforce_hub.header import regular_size

if TYPE_CHECKING:
    from texforce_hub.hub import RemoteFile


@dataclass(frozen=True, slots=True)
class Inspection:
    """The facts of one file. With ``error`` set it is no readable adapter, and only what is known is filled in.

    ``families`` are the candidates, ``verdict`` says them in words, ``evidence`` why. ``parts``, ``ranks``,
    ``alphas``, ``kinds`` and ``dtypes`` count layers; an alpha of ``None`` means that the file stores none.
    ``problems`` are one line each.
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
    alphas: Mapping[float | None, int] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)
    dtypes: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
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
        return plain | {"path": str(self.path), "autov2": self.autov2, "layers": self.layers}


def inspect_file(path: str | Path) -> Inspection:
    """The facts of one file, adapter or not; nothing in it is run, and its tensors are only hashed.

    Raises:
        FileError: there is no such file, or it cannot be opened. A damaged one gives its ``error``.
    """
    path = Path(path)
    size, sha256 = _hash(path)
    known = Inspection(path, size, sha256)
    try:
        container = sniff(path)
        planned = plan(open_header(path))
    except TexForceHubError as error:
        return with_error(known, str(error))
    return describe(path, size, sha256, container, planned)


def inspect_files(paths: "Sequence[Path | RemoteFile]", *, workers: int = 4) -> Iterator[Inspection]:
    """The facts of many files, in order, each as it is ready; a file that cannot be opened gives its ``error``.

    Files on the Hub stay there.
    """
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(_inspect_safely, paths)


def _inspect_safely(path: "Path | RemoteFile") -> Inspection:
    if not isinstance(path, Path):
        from texforce_hub.inspection.remote import inspect_remote_file

        return inspect_remote_file(path)
    try:
        return inspect_file(path)
    except TexForceHubError as error:
        return with_error(Inspection(path), str(error))


def with_error(known: Inspection, error: str) -> Inspection:
    """What is known of a file that is no readable adapter, and why it is none."""
    error = error.removeprefix(f"{known.path}: ")
    return Inspection(known.path, known.size, known.sha256, known.container, error=error)


def _hash(path: Path) -> tuple[int, str]:
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            return size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error


def describe(path: Path, size: int, sha256: str, container: str, planned: Plan) -> Inspection:
    """The facts of a file, from what is planned of it."""
    layers = planned.layers.values()
    return Inspection(
        path=path,
        size=size,
        sha256=sha256,
        container=container,
        dialects=planned.dialects,
        families=planned.family.candidates,
        verdict=planned.family.summary,
        evidence=planned.family.evidence,
        parts=_counted(layer.name.partition(".")[0] for layer in layers),
        ranks=_counted(layer.rank for layer in layers),
        alphas=_counted(layer.alpha for layer in layers),
        kinds=_counted(("DoRA" if layer.decomposed else layer.kind) or "unreadable" for layer in layers),
        dtypes=_counted(layer.dtype for layer in layers),
        metadata=dict(planned.metadata),
        extras=planned.extras,
        problems=planned.problems,
        error=planned.faults[0] if planned.faults else None,
    )


T = TypeVar("T")


def _counted(values: Iterator[T]) -> dict[T, int]:
    return dict(Counter(values).most_common())
