"""Weights inside a prompt, as A1111's web UI writes them.

::

    (words:1.2)   these words at 1.2        [words]   at 1 / 1.1
    (words)       at 1.1                    \\( \\) \\[ \\] \\\\   the characters themselves

Weights inside one another multiply, and a ``)`` or ``]`` that closes nothing is text. What needs the denoising
steps (``[from:to:0.5]``, ``[a|b]``) or several prompts at once (``AND``, ``BREAK``) is refused.
"""

import math
import re
from dataclasses import dataclass

from texforce_hub.arguments import NUMBER, fail, parse_number, write_number
from texforce_hub.errors import ConfigError, RefError

STRONGER = 1.1
"""What a pair of parentheses multiplies by; a pair of brackets divides by it."""

_SPECIAL = re.compile(r"\\(?P<escaped>[()\[\]\\])|:\s*(?P<number>[+-]?[.\d][^\s()\[\]:\\]*)\s*\)|(?P<mark>[()\[\]])")
_WEIGHTED = re.compile(r"(?<!\\)\(.*?:\s*[+-]?[.\d]+\s*\)", re.DOTALL)
_ESCAPED = re.compile(r"\\[()\[\]]")
_UNSAID = re.compile(r"[(\[]|\b(?:AND|BREAK)\b")
_WORD = re.compile(r"\b(?:AND|BREAK)\b")
_STEPS = re.compile(r"\||:\s*[.\d]+\s*\Z")

WAYS = ("auto", "on", "off")
"""How :func:`read_emphasis` can read a prompt."""

Fragment = tuple[str, float]
"""Words and their weight."""


@dataclass(frozen=True, slots=True)
class Emphasis:
    """A prompt as words with weights, neighbours of the same weight put together.

    Raises:
        RefError: a weight that is not finite, or below 0.
    """

    fragments: tuple[Fragment, ...]

    def __post_init__(self) -> None:
        for text, weight in self.fragments:
            if not math.isfinite(weight) or weight < 0:
                raise RefError(f"{text!r} has weight {weight:g}; expected one from 0, e.g. (word:1.2)")

    @classmethod
    def parse(cls, text: str) -> "Emphasis":
        """The words and weights of a prompt in A1111's syntax.

        Raises:
            RefError: a parenthesis is left open, or something that is no weight; shown with a caret.
        """
        return cls(_joined(_Reader(text).read()))

    @property
    def text(self) -> str:
        """The words alone."""
        return "".join(text for text, _ in self.fragments)

    @property
    def is_plain(self) -> bool:
        """Whether every word has weight 1."""
        return all(weight == 1.0 for _, weight in self.fragments)

    def __str__(self) -> str:
        return "".join(
            _escape(text) if weight == 1.0 else f"({_escape(text)}:{write_number(weight)})"
            for text, weight in self.fragments
        )


def read_emphasis(text: str, how: str = "auto") -> Emphasis:
    """A prompt read in A1111's syntax (``on``), as it stands (``off``), or in that which it is surely in (``auto``).

    Raises:
        RefError: as :meth:`Emphasis.parse`.
        ConfigError: another word than these three.
    """
    check_way(how)
    if how == "on" or (how == "auto" and is_weighted(text)):
        return Emphasis.parse(text)
    return Emphasis(((text, 1.0),) if text else ())


def check_way(how: str) -> None:
    """Refuse a way of reading weights that there is not.

    Raises:
        ConfigError: it is none of :data:`WAYS`.
    """
    if how not in WAYS:
        raise ConfigError(f"prompt weights {how!r}; expected one of {', '.join(WAYS)}")


def is_weighted(text: str) -> bool:
    """Whether a prompt is surely in A1111's syntax: it has a ``(words:number)``, or a parenthesis escaped."""
    return bool(_WEIGHTED.search(text) or _ESCAPED.search(text))


def may_be_weighted(text: str) -> bool:
    """Whether A1111 would read a prompt in another way than as text, though a writer may have meant text."""
    return _UNSAID.search(text) is not None


def _escape(text: str) -> str:
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


def _joined(fragments: list[list[str | float]]) -> tuple[Fragment, ...]:
    joined: list[Fragment] = []
    for words, number in fragments:
        text, weight = str(words), float(number)
        if not text:
            continue
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return tuple(joined)


class _Reader:
    """One pass over a prompt: what is open, and the pieces so far, each with its product of weights."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.pieces: list[list[str | float]] = []
        self.open: list[tuple[str, int, int]] = []  # the mark, its place, the number of pieces before it

    def read(self) -> list[list[str | float]]:
        if (word := _WORD.search(self.text)) is not None:
            fail(self.text, word.start(), f"{word[0]} joins prompts, which is not done here; write it in small letters")
        at = 0
        for match in _SPECIAL.finditer(self.text):
            self.pieces.append([self.text[at : match.start()], 1.0])
            at = match.end()
            self._take(match)
        self.pieces.append([self.text[at:], 1.0])
        if self.open:
            mark, start, _ = self.open[-1]
            fail(self.text, start, f"{mark!r} is not closed; write \\{mark} for the character itself")
        return self.pieces

    def _take(self, match: re.Match[str]) -> None:
        mark = match["mark"]
        if match["escaped"]:
            self.pieces.append([match["escaped"], 1.0])
        elif mark in ("(", "["):
            self.open.append((mark, match.start(), len(self.pieces)))
        elif not self.open or self.open[-1][0] != ("[" if mark == "]" else "("):
            self.pieces.append([match[0], 1.0])
        elif mark == "]":
            self._check_no_steps(match.start())
            self._close(1 / STRONGER)
        else:
            self._close(STRONGER if mark else self._number(match))

    def _number(self, match: re.Match[str]) -> float:
        start, end = match.span("number")
        if not NUMBER.fullmatch(match["number"]):
            fail(self.text, start, f"{match['number']!r} is not a number; expected a weight, e.g. (word:1.2)")
        number = parse_number(self.text, start, end, "a weight, e.g. (word:1.2)")
        if number < 0:
            fail(self.text, start, "a weight is below 0; expected one from 0, or the words in the negative prompt")
        return number

    def _close(self, factor: float) -> None:
        _, _, first = self.open.pop()
        for piece in self.pieces[first:]:
            piece[1] = float(piece[1]) * factor

    def _check_no_steps(self, end: int) -> None:
        _, start, _ = self.open[-1]
        if _STEPS.search(self.text, start, end):
            fail(self.text, start, "changing the prompt between steps is not done here; write the words themselves")
