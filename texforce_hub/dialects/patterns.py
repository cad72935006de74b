"""PEFT's patterns, ``{"mlp.fc1": 8}``: a value for every module whose name ends so. Patterns come from strangers.

Most are plain names, which are looked up. The others are regular expressions, and one can keep Python busy for years:
those whose worst case is too long are refused before they are tried.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from texforce_hub.errors import DialectError

_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_UNBOUNDED = re.compile(r"(?<!\\)[*+{]")
_CHOICE = re.compile(r"(?<!\\)[|?]")
_STEPS = 3 * 10**8  # a few seconds of matching, for all layers of a file together


@dataclass(frozen=True, slots=True)
class Patterns:
    """Patterns ready for looking up: ``names`` and ``expressions`` with their place, of which the first counts.

    ``dots`` is how many the longest of the names has.
    """

    names: Mapping[str, tuple[int, Any]]
    expressions: tuple[tuple[int, str, Any], ...]
    dots: int

    def find(self, path: str, layers: int) -> Any:
        """The value for a module's path, ``None`` without any; ``layers`` is how many will be asked for.

        Raises:
            DialectError: an expression would take too long.
        """
        found = [self.names[end] for end in _ends(path, self.dots) if end in self.names]
        found += [
            (place, value)
            for place, pattern, value in self.expressions
            if _matches(pattern, path, layers * len(self.expressions))
        ]
        return min(found, key=lambda entry: entry[0])[1] if found else None


def read_patterns(patterns: Any) -> Patterns:
    """``rank_pattern`` or ``alpha_pattern`` of a configuration; ``None`` has no patterns.

    Raises:
        DialectError: it is no object, or a pattern no regular expression.
    """
    if not isinstance(patterns, (dict, NoneType)):
        raise DialectError(f"a rank or alpha pattern is {patterns!r:.80}; expected an object of patterns and numbers")
    names: dict[str, tuple[int, Any]] = {}
    expressions: list[tuple[int, str, Any]] = []
    for place, (pattern, value) in enumerate((patterns or {}).items()):
        if value is None:
            raise DialectError(f"pattern {pattern!r:.80} has no value; expected a number")
        if _PLAIN.fullmatch(pattern):
            plain = pattern.replace("\\", "").removeprefix("^").removesuffix("$")
            names.setdefault(plain.removeprefix("text_model."), (place, value))
        else:
            expressions.append((place, _checked(pattern), value))
    return Patterns(names, tuple(expressions), max((name.count(".") for name in names), default=0))


def _checked(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise DialectError(f"pattern {pattern!r:.80} is no regular expression ({error}); mend it") from error
    return pattern


def _ends(path: str, dots: int) -> Iterator[str]:
    """The path's last component, its last two … up to ``dots`` dots, and the whole of a shorter one."""
    end = ""
    for part in reversed(path.rsplit(".", dots + 1)[-(dots + 1) :]):
        end = f"{part}.{end}" if end else part
        yield end


def _matches(pattern: str, path: str, times: int) -> bool:
    steps = math.inf if _REPEATED_GROUP.search(pattern) else _count_steps(pattern, len(path))
    if steps * times > _STEPS:
        raise DialectError(f"pattern {pattern!r:.80} could take forever to match; name the modules plainly instead")
    flat = pattern.removeprefix("^").removeprefix("text_model.")
    return any(re.fullmatch(rf"(.*\.)?({one})", path) for one in dict.fromkeys((pattern, flat)))


def _count_steps(pattern: str, length: int) -> float:
    """An upper bound of what matching can cost: every repeat can end anywhere, every group take any of its choices."""
    repeats = len(_UNBOUNDED.findall(pattern)) + 1  # what precedes the pattern is one more
    choices = math.prod(1 + len(_CHOICE.findall(part)) for part in pattern.split(")"))
    return float(length) ** min(repeats, 50) * min(choices, 10**9)
