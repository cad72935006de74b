"""The catalogue: adapters, U-Nets and bases that can be meant by one word, ``adapters/<name>.toml`` each.

An entry either ships its weights with the package (``folder``) or says where they are on the Hub (``repo``, ``file``).
It names the full commit there as ``revision``, and ``sha256``, where they are known; where they are not, the commit is
looked up once, when the entry is first used, and noted: an entry never means one thing today and another tomorrow.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType

from texforce_hub.errors import ConfigError
from texforce_hub.settings import read_settings, suggest_name

_PACKAGE = Path(__file__).parents[1]
ROOT = _PACKAGE / "_catalog" if (_PACKAGE / "_catalog").is_dir() else _PACKAGE.parent / "adapters"
"""Where the entries lie: inside an installed package, beside the package in a checkout."""

KINDS = ("adapter", "unet", "base")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One thing of the catalogue.

    ``name`` is the file's stem; ``kind`` one of :data:`KINDS`; ``family`` a row of the family table; ``parts``
    what it changes; ``folder`` where shipped weights lie, absolute once loaded; ``license`` an SPDX id or a
    model licence's name.
    """

    name: str
    title: str
    family: str
    license: str
    kind: str = "adapter"
    parts: tuple[str, ...] = ()
    folder: Path | None = None
    repo: str | None = None
    revision: str | None = None
    file: str | None = None
    sha256: str | None = None
    citation: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"catalogue entry {self.name!r}: kind {self.kind!r}; expected one of {', '.join(KINDS)}")
        if (self.folder is None) == (self.repo is None):
            raise ConfigError(f"catalogue entry {self.name!r}: expected a folder or a repo, and not both")
        if self.revision is not None and not _COMMIT.fullmatch(self.revision):
            raise ConfigError(
                f"catalogue entry {self.name!r}: revision {self.revision!r}; expected a full commit, or none: "
                "then it is looked up once, when the entry is first used, and noted"
            )
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise ConfigError(f"catalogue entry {self.name!r}: sha256 {self.sha256!r}; expected 64 hexadecimal digits")


def read_catalog(root: Path = ROOT) -> Mapping[str, CatalogEntry]:
    """Every entry under ``root`` by name; none if there is no such folder.

    Raises:
        ConfigError: an entry is no TOML, lacks a field, or has one that is not known.
    """
    return _read_catalog(root)


@cache
def _read_catalog(root: Path) -> Mapping[str, CatalogEntry]:
    return MappingProxyType({path.stem: _read_entry(path) for path in sorted(root.glob("*.toml"))})


def _read_entry(path: Path) -> CatalogEntry:
    try:
        values = read_settings(path)
    except ConfigError as error:
        raise ConfigError(f"catalogue entry: {error}") from error
    known = [field.name for field in fields(CatalogEntry) if field.name != "name"]
    for key in values.keys() - set(known):
        hint = suggest_name(key, known, otherwise="known are")
        raise ConfigError(f"catalogue entry {path}: unknown {key!r}; {hint}")
    missing = [key for key in ("title", "family", "license") if not isinstance(values.get(key), str)]
    if missing:
        raise ConfigError(f"catalogue entry {path}: lacks {', '.join(missing)}")
    if "folder" in values:
        values["folder"] = _inside(path, values["folder"])
    return CatalogEntry(name=path.stem, **values | {"parts": tuple(values.get("parts", ()))})


def _inside(path: Path, folder: str) -> Path:
    inner = (path.parent / folder).resolve()
    if not inner.is_relative_to(path.parent.resolve()):
        raise ConfigError(f"catalogue entry {path}: folder {folder!r} lies outside the catalogue")
    return inner
