"""PEFT's patterns, ``{"mlp.fc1": 8}``: a value for every module whose name ends so. Patterns come from strangers.

A pattern is a regular expression that must match a module's whole name, or all of it after a dot; ``^`` stands for
the name's own beginning, and a dot for any character. Most patterns are plain names with dots, which are looked up.
The others can keep Python busy for years: those whose worst case is too long are refused before they are tried.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from texforce_hub.errors import DialectError

_PLAIN = re.compile(r"(?P<start>\^?)(?P<name>(?:[\w-]|\\?\.)+)\$?")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_UNBOUNDED = re.compile(r"(?<!\\)[*+{]")
_CHOICE = re.compile(r"(?<!\\)[|?]")
_STEPS = 3 * 10**8  # a few seconds of matching, for all layers of a file together


@dataclass(frozen=True, slots=True)
class _Form:
    """What plain patterns that are looked up together share: their length, and which characters may be any.

    ``whole`` is that they must be the module's whole name.
    """

    length: int
    wild: tuple[int, ...]
    whole: bool

    def key_of(self, path: str) -> str | None:
        """The end of a module's name as a pattern of this form would be written; ``None`` if it has no such end."""
        start = len(path) - self.length
        if start < 0 or (start > 0 and (self.whole or path[start - 1] != ".")):
            return None
        end = list(path[start:])
        for position in self.wild:
            end[position] = "."
        return "".join(end)


@dataclass(frozen=True, slots=True)
class Patterns:
    """Patterns ready for looking up: plain ``names`` by their form, and ``expressions``, each with its position.

    Of those that fit, the first counts.
    """

    names: Mapping[_Form, Mapping[str, tuple[int, Any]]]
    expressions: tuple[tuple[int, str, Any], ...]

    def find(self, path: str, layers: int) -> Any:
        """The value for a module's name, ``None`` without any; ``layers`` is how many will be asked for.

        Raises:
            DialectError: finding it would take too long.
        """
        if len(self.names) * len(path) * layers > _STEPS:
            raise DialectError(f"{len(self.names)} sorts of rank or alpha patterns could take forever to look through")
        matches = [table[key] for form, table in self.names.items() if (key := form.key_of(path) or "") in table]
        times = layers * len(self.expressions)
        matches += [
            (position, value) for position, pattern, value in self.expressions if _matches(pattern, path, times)
        ]
        return min(matches, key=lambda entry: entry[0])[1] if matches else None


def read_patterns(patterns: Any) -> Patterns:
    """``rank_pattern`` or ``alpha_pattern`` of a configuration; ``None`` has no patterns.

    Raises:
        DialectError: it is no object, or a pattern no regular expression.
    """
    if not isinstance(patterns, (dict, NoneType)):
        raise DialectError(f"a rank or alpha pattern is {patterns!r:.80}; expected an object of patterns and numbers")
    names: dict[_Form, dict[str, tuple[int, Any]]] = {}
    expressions: list[tuple[int, str, Any]] = []
    for position, (pattern, value) in enumerate((patterns or {}).items()):
        if value is None:
            raise DialectError(f"pattern {pattern!r:.80} has no value; expected a number")
        plain = _PLAIN.fullmatch(pattern)
        if plain is None:
            expressions.append((position, _checked(pattern), value))
            continue
        name = plain["name"].replace("\\", "")
        form = _Form(len(name), tuple(_any_characters(plain["name"])), bool(plain["start"]))
        names.setdefault(form, {}).setdefault(name, (position, value))
    return Patterns(names, tuple(expressions))


def _any_characters(name: str) -> Iterator[int]:
    """Where a plain pattern has dots that are not escaped, counted without the escapes."""
    escapes = 0
    for position, character in enumerate(name):
        if character == "." and name[position - 1 : position] != "\\":
            yield position - escapes
        escapes += character == "\\"


def _anywhere(pattern: str) -> str:
    """PEFT's expression: the pattern at the end of a module's name, at its beginning or after a dot."""
    return rf"(.*\.)?({pattern})"


def _checked(pattern: str) -> str:
    try:
        re.compile(_anywhere(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise DialectError(f"pattern {pattern!r:.80} is no regular expression ({error}); fix it") from error
    return pattern


def _matches(pattern: str, path: str, times: int) -> bool:
    steps = math.inf if _REPEATED_GROUP.search(pattern) else _count_steps(pattern, len(path))
    if steps * times > _STEPS:
        raise DialectError(f"pattern {pattern!r:.80} could take forever to match; name the modules plainly instead")
    return re.fullmatch(_anywhere(pattern), path) is not None


def _count_steps(pattern: str, length: int) -> float:
    """An upper bound of what matching can cost: every repeat can end anywhere, every group take any of its choices."""
    repeats = len(_UNBOUNDED.findall(pattern)) + 1  # what precedes the pattern is one more
    choices = math.prod(1 + len(_CHOICE.findall(part)) for part in pattern.split(")"))
    return float(length) ** min(repeats, 50) * min(choices, 10**9)
