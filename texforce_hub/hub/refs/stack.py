"""Adapters that act together, as a user writes them on one line."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

from texforce_hub.arguments import fail
from texforce_hub.errors import RefError
from texforce_hub.hub.refs.adapter import AdapterRef, Exists, exists_on_disk

_TOKEN = re.compile(r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)|(['"])|(.)""", re.DOTALL)
_NEEDS_QUOTES = re.compile(r"[\s'\"\\+]")


@dataclass(frozen=True, slots=True)
class Stack:
    """Adapters that act together, in order."""

    refs: tuple[AdapterRef, ...]

    @classmethod
    def parse(cls, text: str, *, exists: Exists = exists_on_disk) -> "Stack":
        """The stack that ``text`` writes: references between spaces or pluses; quotes protect both.

        Raises:
            RefError: a word is no reference, a quote is open, or there is nothing.
        """
        words = [word for run in _split_spaces(text) for word in _split_pluses(run, exists)]
        if not words:
            fail(text, len(text), 'no adapter; expected at least one, e.g. "A:0.8 + B:-0.3"')
        return cls(tuple(AdapterRef.parse(word, exists=exists) for word in words))

    def __str__(self) -> str:
        return " + ".join(_quote(str(ref)) for ref in self.refs)

    @property
    def labels(self) -> tuple[str, ...]:
        """One label for each adapter, made unique with a number where two are alike."""
        return make_unique(ref.label for ref in self.refs)


def make_unique(labels: Iterable[str]) -> tuple[str, ...]:
    """The labels, ``a``, ``a-2``, ``a-3`` … where several are alike."""
    unique: list[str] = []
    for label in labels:
        tries = (label if number == 1 else f"{label}-{number}" for number in count(1))
        unique.append(next(candidate for candidate in tries if candidate not in unique))
    return tuple(unique)


def _quote(word: str) -> str:
    return "'" + word.replace("'", "'\"'\"'") + "'" if _NEEDS_QUOTES.search(word) else word


Character = tuple[str, bool]
"""A character of a stack, and whether quotes or a backslash protect it."""


def _read_characters(text: str) -> Iterator[Character]:
    for token in _TOKEN.finditer(text):
        single, double, escaped, opened, plain = token.groups()
        if opened:
            fail(text, token.start(), "a quote is not closed")
        if plain:
            yield plain, False
        quoted = single or escaped or re.sub(r"\\(.)", r"\1", double or "", flags=re.DOTALL)
        yield from ((character, True) for character in ("" if plain else quoted))


def _split_spaces(text: str) -> Iterator[list[Character]]:
    word: list[Character] = []
    for character, is_protected in _read_characters(text):
        if is_protected or not character.isspace():
            word.append((character, is_protected))
        elif word:
            yield word
            word = []
    if word:
        yield word


def _is_there(text: str, exists: Exists) -> bool:
    try:
        return exists(AdapterRef.parse(text, exists=exists).source)
    except RefError:
        return False


def _split_pluses(word: list[Character], exists: Exists) -> list[str]:
    """The names between bare pluses; a sign after ``:`` or ``=`` is none, nor is a plus in an existing name."""
    whole = "".join(character for character, _ in word)
    if _is_there(whole, exists):
        return [whole]
    names = [""]
    for character, is_protected in word:
        if character == "+" and not is_protected and not names[-1].endswith((":", "=")):
            names.append("")
        else:
            names[-1] += character
    return [name for name in names if name]
