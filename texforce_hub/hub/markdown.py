"""Strangers' text in Markdown: it stays text, whatever it is made of."""

import re
import unicodedata

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#!|~$:@]|^[-+=]|(?<=www)\.)")
_NUMBERED = re.compile(r"^(\d+)\.(?=\s|$)")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}
_COMMENT = r"<\u0021--"  # in a string of TOML or JSON
_BACKTICKS = re.compile(r"`+")


def plain_line(text: str, most: int = 300) -> str:
    """A text on one line, without control characters and what turns the direction of writing, at most so long."""
    spaced = " ".join(text.split())
    kept = "".join(c for c in spaced if c == " " or not unicodedata.category(c).startswith(("C", "Zl", "Zp")))
    return kept if len(kept) <= most else f"{kept[: most - 1]}…"


def escape(text: str, most: int = 300) -> str:
    """A text as Markdown and HTML show it letter by letter: no tag, link, emphasis, cell or mention comes of it."""
    marked = _NUMBERED.sub(r"\1\\.", _SPECIAL.sub(r"\\\1", plain_line(text, most)))
    return "".join(_ENTITIES.get(c, c) for c in marked)


def escape_cell(text: object) -> str:
    """As :func:`escape`, for a cell of a table; never empty."""
    return escape(str(text)) or "–"


def fence(text: str, language: str = "") -> str:
    """A block of code that the text cannot end, however many backticks are in it."""
    longest = max((len(run) for run in _BACKTICKS.findall(text)), default=0)
    ticks = "`" * max(3, longest + 1)
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text.rstrip())
    return f"{ticks}{language}\n{shown.replace('<!--', _COMMENT)}\n{ticks}"
