"""What every command prints with: results on stdout, everything else on stderr, nothing raw."""

import codecs
import io
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 120  # characters of a table in a file or a pipe
_MOST_ROWS = 3000  # of a table; more are neither read by anybody nor drawn in reasonable time
_PLAIN = str.maketrans("█▏▎▍▌▋▊▉–—…×·→“”‘’", "########--~x.>\"\"''")  # one for one, so that tables keep their columns


def accept_any_text() -> None:
    """Let stdout and stderr take characters that their encoding lacks: like ones, else question marks, are written."""
    codecs.register_error("texforce_hub.plain", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="texforce_hub.plain")


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(character if character.isascii() else "?" for character in text), error.end


def printable(text: str) -> str:
    """The text with control characters and terminal escapes shown as ``\\x1b``, never sent to the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """A line for the person at the terminal (stderr)."""
    typer.echo(printable(text), err=True)


def put(text: str) -> None:
    """A line of the result (stdout)."""
    typer.echo(printable(text))


def first_of(lines: Sequence[str], most: int = 20) -> list[str]:
    """The first lines, and one that says how many more there are; --json has them all."""
    more = len(lines) - most
    return [*lines[:most], *([f"… and {more} more; --json has them all"] if more > 0 else [])]


def put_json(value: Any) -> None:
    """The result as one JSON object (stdout); control characters leave as JSON escapes."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=True, default=str))


def put_table(
    columns: list[str],
    rows: list[list[str]],
    *,
    title: str | None = None,
    whole: Collection[str] = (),
    widths: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """A table (stdout). Cells are data: markup and escapes in them are shown, not obeyed.

    The columns ``whole`` are never folded; where there is room, those of ``widths`` are folded at that width.
    """
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    table = Table(title=None if title is None else Text(printable(title)), title_justify="left")
    for index, column in enumerate(columns):
        longest = max(len(row[index]) for row in [columns, *rows[:_MOST_ROWS]])
        width = min(widths[column], longest) if column in widths and console.width >= _WIDTH else None
        table.add_column(column, overflow="fold", no_wrap=column in whole, width=width)
    for row in rows[:_MOST_ROWS]:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
    if len(rows) > _MOST_ROWS:
        put(f"… and {len(rows) - _MOST_ROWS} more rows; --json has them all")
