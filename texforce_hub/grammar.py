"""What all names share: numbers, and mistakes shown with a caret."""

import math
import re
from typing import NoReturn

from texforce_hub.errors import RefError

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def fail(text: str, position: int, problem: str) -> NoReturn:
    """Raise a RefError that shows ``text`` with a caret under the character at ``position``."""
    shown = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in text]
    indent = " " * len("".join(shown[:position]))
    raise RefError(f"{problem}\n  {''.join(shown)}\n  {indent}^")


def parse_number(text: str, start: int, end: int, what: str) -> float:
    """The finite number at ``text[start:end]``; ``what`` says in the error what was expected."""
    word = text[start:end]
    if not NUMBER.fullmatch(word):
        fail(text, start, f"{word!r} is not a number; expected {what}")
    value = float(word)
    if not math.isfinite(value):
        fail(text, start, f"{word!r} is too large a number; expected {what}")
    return value


def write_number(number: float) -> str:
    """The shortest text that :func:`parse_number` reads as this number."""
    return repr(number).removesuffix(".0")
