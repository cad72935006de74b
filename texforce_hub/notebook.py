"""Tables as notebooks show them: HTML in which every text is escaped, with bars where numbers are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_BAR = "display:inline-block;position:relative;width:8em;height:.7em;background:#8882;vertical-align:middle"
_FILLED = "position:absolute;top:0;height:100%;background:#48c"


@dataclass(frozen=True, slots=True)
class Bar:
    """A cell that draws the share from ``low`` to ``high``, in [0, 1], behind its text; what lies outside is cut."""

    text: str
    high: float
    low: float = 0.0

    def html(self) -> str:
        """The text and the bar."""
        low, high = (min(1.0, max(0.0, share)) for share in (self.low, self.high))
        filled = f'<span style="{_FILLED};left:{low:.1%};width:{max(0.0, high - low):.1%}"></span>'
        return f'{escape(self.text)} <span style="{_BAR}">{filled}</span>'


Cell = str | Bar


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table with a title; without rows, the title alone."""
    caption = f'<caption style="text-align:left;font-weight:bold">{escape(title)}</caption>'
    head = "".join(f'<th style="text-align:left">{escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table>{caption}{f'<thead><tr>{head}</tr></thead><tbody>{body}</tbody>' if rows else ''}</table>"


def write_size(size: int) -> str:
    """A number of bytes as people read it: ``48.2 kB``, ``151.1 MB``."""
    for unit, least in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= least:
            return f"{size / least:.1f} {unit}"
    return f"{size} bytes"


def _cell(cell: Cell) -> str:
    return f'<td style="text-align:left">{cell.html() if isinstance(cell, Bar) else escape(cell)}</td>'
