"""Settings by name: a frozen dataclass whose fields say what they may be, from and to a flat TOML table.

A field's type is ``int``, ``float``, ``str``, ``tuple[str, ...]``, a ``Literal``, or one of these ``| None``;
``Annotated`` with a :class:`Range` it says which numbers are allowed.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

from texforce_hub.errors import ConfigError
from texforce_hub.reading import read_toml


@dataclass(frozen=True)
class Range:
    """Which numbers a setting may be, in words and as a test."""

    expected: str
    holds: Callable[[float], bool] = field(repr=False)


def at_least(least: float) -> Range:
    """``least`` and all above."""
    return Range(f"at least {least}", lambda value: value >= least)


ABOVE_ZERO = Range("more than 0", lambda value: value > 0)

Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
NotNegative = Annotated[float, at_least(0)]
Positive = Annotated[float, ABOVE_ZERO]
UNIT = Range("a value from 0 to 1", lambda value: 0 <= value <= 1)
Share = Annotated[float, UNIT]


@dataclass(frozen=True)
class Settings:
    """A set of settings; a subclass names them as its fields and calls :meth:`check` when it is made."""

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Self:
        """Settings by name; lists become tuples.

        Raises:
            ConfigError: a name that does not exist (the nearest is named), or a value that cannot be.
        """
        known = [field.name for field in fields(cls)]
        for name in table:
            if name not in known:
                raise ConfigError(f"there is no option {name!r}; {suggest_name(name, known, otherwise='known are')}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in table.items()})

    def check(self) -> None:
        """Every field against its annotation.

        Raises:
            ConfigError: a value that is out of its range, or of another type; the message names it.
        """
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            kind, *ranges = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            if not _fits(value, kind):
                raise ConfigError(f"{name} = {value!r}; expected {_name_type(kind)}")
            for allowed in ranges:
                if value is not None and not allowed.holds(value):
                    raise ConfigError(f"{name} = {value!r}; expected {allowed.expected}")


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if kind is float:
        # NaN, infinity and a whole number beyond every float are no settings.
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _name_type(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(_name_type(option) for option in get_args(kind) if option is not NoneType)
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of strings"
    return {int: "a whole number", float: "a finite number", str: "a string"}[kind]


def suggest_name(name: str, known: Iterable[str], *, otherwise: str) -> str:
    """``did you mean …?`` with the nearest of the known names; if none is near, ``otherwise`` and all of them."""
    names = list(known)
    nearest = nearest_names(name, names)
    return f"did you mean {nearest[0]!r}?" if nearest else f"{otherwise} {', '.join(names) or 'none'}"


def nearest_names(name: str, known: Iterable[str], *, most: int = 1) -> list[str]:
    """The known names that are spelled most like one, the nearest first; capitals do not count."""
    lowered = {other.lower(): other for other in known}
    return [lowered[key] for key in get_close_matches(name.lower(), lowered, n=most, cutoff=0.5)]


def read_settings(path: str | Path) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
        ConfigError: there is no such file, or it is no TOML, or none of settings.
    """
    return read_toml(path, error=ConfigError)


def write_settings(settings: Mapping[str, Any]) -> str:
    """A flat table as TOML, without what is ``None``; inverse of ``tomllib.loads``."""
    # A JSON string, number or list of strings is spelled the same in TOML.
    given = {name: value for name, value in settings.items() if value is not None}
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in given.items())
