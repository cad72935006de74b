"""What was done, in full: sources with their hashes, weights, method, options, seed and versions; TOML ⇄ value.

A recipe names files and numbers, nothing that runs. It is written beside a result and into its metadata.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from texforce_hub.errors import RecipeError
from texforce_hub.reading import parse_toml

#: The version of the layout below; a reader refuses what it does not know.
FORMAT = 1
#: The metadata entry in which a result carries its recipe.
METADATA_KEY = "texforce_hub.recipe"

Kind = Literal["merge", "apply"]
Setting = str | int | float | bool

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SOURCE_KEYS = {"source", "name", "weight", "parts", "revision", "sha256", "prompt", "schedule"}
_TOP_KEYS = {"format", "kind", "method", "seed", "options", "settings", "versions", "source"}


@dataclass(frozen=True, slots=True)
class RecipeSource:
    """One adapter that went in.

    source: as the user named it: a path, a catalogue name or a Hub id
    weight: for every layer, unless ``parts`` names some
    parts: weights by part, block or pattern
    revision: the full commit, if it came from the Hub
    sha256: of the file's bytes, 64 hexadecimal digits; empty: unknown
    prompt: the number, from 0, of the one prompt whose tag asked for it; ``None``: it acts on all
    schedule: how its weights change over the denoising steps, as a reference writes it; empty: they do not
    """

    source: str
    weight: float = 1.0
    parts: Mapping[str, float] = field(default_factory=dict)
    name: str = ""
    revision: str = ""
    sha256: str = ""
    prompt: int | None = None
    schedule: str = ""

    def __post_init__(self) -> None:
        if not self.source:
            raise RecipeError("a recipe's source is empty; expected a path, a catalogue name or a Hub id")
        if self.sha256 and not _SHA256.fullmatch(self.sha256):
            raise RecipeError(f"{self.source}: sha256 {self.sha256[:80]!r}; expected 64 hexadecimal digits")
        if not all(math.isfinite(w) for w in (self.weight, *self.parts.values())):
            raise RecipeError(f"{self.source}: a weight is not finite")
        if self.prompt is not None and self.prompt < 0:
            raise RecipeError(f"{self.source}: prompt {self.prompt}; expected its number from 0")
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything needed to do it again.

    kind: what was done, ``merge`` or ``apply``
    method, options: the merge method and its own options
    settings: what else was asked for (``rank``, ``energy``, ``mode``, ``prompt`` …), tables of numbers included
    versions: of the libraries that did it, for the record
    """

    kind: Kind
    sources: tuple[RecipeSource, ...]
    method: str = ""
    options: Mapping[str, Setting] = field(default_factory=dict)
    settings: Mapping[str, Setting | Mapping[str, Setting]] = field(default_factory=dict)
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise RecipeError(f"recipe of kind {self.kind!r:.80}; expected one of {', '.join(get_args(Kind))}")
        if not self.sources:
            raise RecipeError("a recipe without sources; expected at least one [[source]]")
        if self.kind == "merge" and any(source.schedule for source in self.sources):
            raise RecipeError("a merge has no denoising steps, and a source's schedule needs them; leave it out")
        for name in ("options", "settings", "versions"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """The recipe written in a TOML text; ``parse(str(recipe)) == recipe``.

        Raises:
            RecipeError: not TOML, another format version, an unknown or missing key, a value of the wrong type.
        """
        table = parse_toml(text, "the recipe", error=RecipeError)
        if table.get("format") != FORMAT:
            raise RecipeError(f"recipe of format {table.get('format')!r:.80}; this version reads format {FORMAT}")
        _check_keys(table, _TOP_KEYS, "recipe")
        return cls(
            kind=_typed(table, "kind", str, ""),
            sources=tuple(_read_source(entry) for entry in _typed(table, "source", list, [])),
            method=_typed(table, "method", str, ""),
            options=_typed(table, "options", dict, {}),
            settings=_typed(table, "settings", dict, {}),
            seed=_typed(table, "seed", int, 0),
            versions=_typed(table, "versions", dict, {}),
        )

    def __str__(self) -> str:
        head: dict[str, Any] = {"format": FORMAT, "kind": self.kind, "method": self.method, "seed": self.seed}
        lines = _write_pairs({key: value for key, value in head.items() if value != ""})
        for source in self.sources:
            lines += ["", "[[source]]", *_write_pairs(_source_table(source))]
        for name, table in (("options", self.options), ("settings", self.settings), ("versions", self.versions)):
            if table:
                lines += ["", f"[{name}]", *_write_pairs(table)]
        return "\n".join(lines) + "\n"


def _check_keys(table: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise RecipeError(f"{where}: unknown key {unknown[0]!r:.80}; it may have {', '.join(sorted(known))}")


def _typed(table: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = table.get(key, default)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RecipeError(f"recipe: {key} = {value!r:.80}; expected a {kind.__name__}")
    return value


def _read_source(entry: Any) -> RecipeSource:
    if not isinstance(entry, dict):
        raise RecipeError(f"recipe: source {entry!r:.80}; expected a [[source]] table")
    _check_keys(entry, _SOURCE_KEYS, "[[source]]")
    numbers = [entry.get("weight", 1.0), *_typed(entry, "parts", dict, {}).values()]
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise RecipeError(f"recipe: weights {numbers!s:.80} of {entry.get('source')!r:.80}; expected numbers")
    return RecipeSource(
        source=_typed(entry, "source", str, ""),
        weight=float(numbers[0]),
        parts={key: float(value) for key, value in entry.get("parts", {}).items()},
        **{key: _typed(entry, key, str, "") for key in ("name", "revision", "sha256", "schedule")},
        prompt=_typed(entry, "prompt", int, 0) if "prompt" in entry else None,
    )


def _source_table(source: RecipeSource) -> dict[str, Any]:
    table: dict[str, Any] = {"source": source.source}
    table |= {key: value for key in ("name", "revision", "sha256", "schedule") if (value := getattr(source, key))}
    table |= {"prompt": source.prompt} if source.prompt is not None else {}
    return table | ({"parts": source.parts} if source.parts else {"weight": source.weight})


def _write_pairs(table: Mapping[str, Any]) -> list[str]:
    return [f"{_write_key(key)} = {_write_value(key, value)}" for key, value in table.items() if value is not None]


def _write_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else write_text(key)


def write_text(text: str) -> str:
    """A TOML string of this text."""
    # JSON's escapes are TOML's, except that TOML also wants DEL escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _write_value(key: str, value: Any) -> str:
    if isinstance(value, str):
        return write_text(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_write_pairs(value)) + " }" if value else "{}"
    raise RecipeError(f"{key} = {value!r} cannot be written in a recipe; expected text, a finite number or a table")
