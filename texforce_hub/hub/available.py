"""Adapters that are here: in the catalogue, in the cache that Hugging Face libraries share, in folders of one's own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from texforce_hub.errors import TexForceHubError
from texforce_hub.hub.bundles import Bundle
from texforce_hub.hub.cache import hub_id_of
from texforce_hub.hub.catalog import CatalogEntry, read_catalog
from texforce_hub.hub.filenames import is_candidate
from texforce_hub.hub.find import find_bundles
from texforce_hub.hub.huggingface.store import list_snapshots
from texforce_hub.hub.inspect import Inspection, inspect_file

_LARGEST = 4_000_000_000  # bytes: what is larger is a model, and not looked into


@dataclass(frozen=True, slots=True)
class Shelved:
    """An adapter that is here, or that the catalogue knows: by which name, of what, and where.

    Sizes and ranks of what is still on the Hub are not known: 0 and nothing.
    """

    name: str
    family: str
    parts: tuple[str, ...]
    ranks: tuple[int, ...]
    size: int
    license: str
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {field: getattr(self, field) for field in self.__slots__}


def list_shelf(folders: Sequence[Path] = ()) -> list[Shelved]:
    """The catalogue's entries, the adapters in the shared cache, and those in some folders; headers alone are read.

    Raises:
        RefError, FileError: one of the folders is not there.
    """
    shelf = [_describe_entry(entry) for entry in read_catalog().values()]
    shelf += list(_list_cache())
    for folder in folders:
        shelf += [shelved for bundle in find_bundles(folder) if (shelved := _describe(bundle, str(bundle.path), ""))]
    return shelf


def _describe_entry(entry: CatalogEntry) -> Shelved:
    if entry.folder is None:
        where = f"hf://{entry.repo}" + (f"@{entry.revision[:12]}" if entry.revision else "")
        return Shelved(entry.name, entry.family, entry.parts, (), 0, entry.license, f"catalogue, {where}")
    shipped = entry.kind == "adapter" and entry.folder.exists()
    facts = _describe(find_bundles(entry.folder)[0], entry.name, entry.license) if shipped else None
    size, ranks = (facts.size, facts.ranks) if facts is not None else (0, ())
    return Shelved(entry.name, entry.family, entry.parts, ranks, size, entry.license, "catalogue")


def _list_cache() -> Iterator[Shelved]:
    for snapshot in list_snapshots():
        if not any(is_candidate(path.name) for path in snapshot.rglob("*")):
            continue
        for bundle in _bundles_of(snapshot):
            origin = hub_id_of(bundle.path)
            shelved = _describe(bundle, str(origin), "")
            if shelved is not None:
                yield shelved


def _bundles_of(folder: Path) -> list[Bundle]:
    try:
        return find_bundles(folder)
    except TexForceHubError:
        return []


def _describe(bundle: Bundle, name: str, license: str) -> Shelved | None:
    """What a header says of an adapter; ``None`` if it is none, or a whole model."""
    try:
        if sum(path.stat().st_size for path in bundle.files) > _LARGEST:
            return None
        facts = inspect_file(bundle, hashed=False)
    except (TexForceHubError, OSError):
        return None
    return None if facts.error is not None or not facts.parts else _shelve(facts, name, license, bundle.path)


def _shelve(facts: Inspection, name: str, license: str, path: Path) -> Shelved:
    ranks = tuple(sorted(rank for rank in facts.ranks if rank is not None))
    license = license or facts.metadata.get("modelspec.license", "")
    return Shelved(name, ", ".join(facts.families), tuple(facts.parts), ranks, facts.size, license, str(path))
