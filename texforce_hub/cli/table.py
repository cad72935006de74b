"""Tables that fit the terminal: the first column whole as long as it can be, others dropped in a stated order."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from texforce_hub.cli.console import LOUDNESS, printable, put

_UNKNOWN = 120  # columns of a file or a pipe, unless COLUMNS says another number
_NARROWEST = 40
_FOLDED = 28  # characters a line of a name that cannot be shown whole
_LEAST = 12  # characters a line of any other cell that is folded
_LONGEST_UNIT = 20
_MOST_ROWS = 3000  # more are neither read by anybody nor drawn in reasonable time


def terminal_width() -> int:
    """Characters a line: ``COLUMNS``, else the terminal's, else 120 in a file or a pipe; at least 40."""
    return max(_NARROWEST, shutil.get_terminal_size((_UNKNOWN, 24)).columns)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns of a table are shown, by number, and how wide."""

    shown: tuple[int, ...]
    widths: tuple[int, ...]
    dropped: tuple[int, ...]


def lay_out(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, drop: Sequence[str] = ()) -> Layout:
    """Choose columns and widths so that a table fits into ``width`` characters.

    Empty columns are left out. The first is kept whole while it can be; others go in the order of ``drop``, then from
    the last to the left, and one of them always stays.
    """
    filled = [i for i in range(len(columns)) if i == 0 or any(row[i] for row in rows)]
    longest = {i: max(map(_longest_line, [columns[i], *(row[i] for row in rows)])) for i in filled}
    least = {i: _narrowest([columns[i], *(row[i] for row in rows)], longest[i]) for i in filled}
    leaving = [columns.index(name) for name in drop if name in columns]
    leaving += [i for i in reversed(filled[1:]) if i not in leaving]
    for name_width in (longest[0], min(longest[0], _FOLDED)):
        shown = _drop_until_fit(filled, [i for i in leaving if i in filled], least | {0: name_width}, width)
        if _total(shown, least | {0: name_width}) <= width:
            break
    widths = _spread({i: least[i] if i else name_width for i in shown}, longest, width - _frame(len(shown)))
    return Layout(tuple(shown), tuple(widths), tuple(i for i in filled if i not in shown))


def _narrowest(cells: Sequence[str], longest: int) -> int:
    """How narrow a column may be: what a comma divides stays in one piece, if it is not very long."""
    units = max(cell_len(unit) for cell in cells for unit in printable(cell).split(", "))
    return min(longest, max(_LEAST, cell_len(cells[0]), min(units, _LONGEST_UNIT)))


def _longest_line(text: str) -> int:
    return max((cell_len(line) for line in printable(text).splitlines()), default=0)


def _frame(count: int) -> int:
    """What lines and spaces take beside the cells."""
    return 3 * count + 1


def _total(shown: Sequence[int], least: dict[int, int]) -> int:
    return sum(least[i] for i in shown) + _frame(len(shown))


def _drop_until_fit(filled: Sequence[int], leaving: Sequence[int], least: dict[int, int], width: int) -> list[int]:
    shown = list(filled)
    for i in leaving:
        if len(shown) <= 2 or _total(shown, least) <= width:
            break
        shown.remove(i)
    return shown


def _spread(widths: dict[int, int], longest: dict[int, int], room: int) -> list[int]:
    """The room that is left over, to the columns that are folded, from the first to the last."""
    spare = room - sum(widths.values())
    if spare < 0:  # one column beside the name, and even so too wide
        last = max(widths)
        widths[last] = max(1, widths[last] + spare)
    for i in widths:
        more = max(0, min(spare, longest[i] - widths[i]))
        widths[i] += more
        spare -= more
    return list(widths.values())


def put_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    drop: Sequence[str] = (),
) -> None:
    """A table (stdout), unless --quiet. Cells are data: markup and escapes in them are shown, not obeyed.

    Where the terminal is narrow the columns ``drop`` go first; a line under the table names those that went.
    """
    if LOUDNESS.quiet:
        return
    width = terminal_width()
    layout = lay_out(columns, rows[:_MOST_ROWS], width, drop=drop)
    table = Table(
        title=None if title is None else Text(printable(title)), title_justify="left", show_header=any(columns)
    )
    for i, column_width in zip(layout.shown, layout.widths):
        table.add_column(Text(printable(columns[i])), overflow="fold", width=column_width)
    for row in rows[:_MOST_ROWS]:
        table.add_row(*(Text(printable(row[i])) for i in layout.shown))
    Console(width=width, highlight=False).print(table)
    if len(rows) > _MOST_ROWS:
        put(f"… and {len(rows) - _MOST_ROWS} more rows; --json has them all")
    if layout.dropped:
        names = ", ".join(columns[i] for i in layout.dropped)
        count = len(layout.dropped)
        put(f"+ {count} column{'s' if count > 1 else ''} ({names}): --json, or a wider terminal")
