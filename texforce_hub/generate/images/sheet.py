"""Pictures side by side, labelled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from texforce_hub.errors import ConfigError


def as_picture(image: Tensor) -> Image.Image:
    """``(3, h, w)`` in [0, 1] as a picture."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def column_sheet(
    columns: Sequence[Tensor],
    *,
    rows: Sequence[str],
    names: Sequence[str],
    title: str = "",
    caption: str = "",
    bars: Sequence[float] = (),
    smallest: int = 96,
) -> Image.Image:
    """A contact sheet from its columns, each ``(len(rows), 3, h, w)`` in [0, 1]."""
    pictures = [as_picture(column[i]) for i in range(len(rows)) for column in columns]
    return contact_sheet(pictures, rows=rows, columns=names, title=title, caption=caption, bars=bars, smallest=smallest)


_GAP = 6
_BAR = 8  # pixels of a bar's height
_WIDEST = 16_000  # pixels of a sheet's longer side
_LEAST_CELL = 32
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class Label:
    """A text on a sheet: its lines, where it stands and how much room it takes, in pixels."""

    lines: tuple[str, ...]
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class SheetPlan:
    """Where everything of a sheet stands: its size, its cells' size and corners, its labels."""

    size: tuple[int, int]
    cell: tuple[int, int]
    corners: tuple[tuple[int, int], ...]
    labels: tuple[Label, ...]
    font: _Font


def contact_sheet(
    images: Sequence[Image.Image],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    caption: str = "",
    bars: Sequence[float] = (),
    smallest: int = 96,
) -> Image.Image:
    """One picture of many, row by row, each row's label on the left and each column's on top.

    Args:
        images: ``len(rows) · len(columns)`` of them, the first row first; all are drawn at the first one's size.
        rows, columns: their labels, wrapped where they are long.
        title, caption: what one looks at, above all and below all.
        bars: for each image a number from 0 to 1, drawn as a bar under it.
        smallest: pixels of a cell's width at least; smaller pictures are enlarged by a whole number.

    Raises:
        ConfigError: another number of images.
    """
    if not images or len(images) != len(rows) * len(columns):
        raise ConfigError(f"{len(images)} images for a sheet of {len(rows)} rows and {len(columns)} columns")
    texts: dict[str, Any] = {"rows": rows, "columns": columns, "title": title, "caption": caption}
    plan = plan_sheet(images[0].size, **texts, bars=bool(bars), smallest=smallest)
    sheet = Image.new("RGB", plan.size, "white")
    draw = ImageDraw.Draw(sheet)
    for label in plan.labels:
        for number, line in enumerate(label.lines):
            draw.text((label.x, label.y + number * _line_height(plan.font)), line, fill="black", font=plan.font)
    for image, corner in zip(images, plan.corners, strict=True):
        sheet.paste(image.convert("RGB").resize(plan.cell, Image.Resampling.NEAREST), corner)
    for share, (x, y) in zip(bars, plan.corners):
        _draw_bar(draw, (x, y + plan.cell[1] + 2), plan.cell[0], share)
    return sheet


def _draw_bar(draw: ImageDraw.ImageDraw, corner: tuple[int, int], width: int, share: float) -> None:
    (x, y), filled = corner, round(width * min(1.0, max(0.0, share)))
    draw.rectangle((x, y, x + width - 1, y + _BAR - 1), fill="#dddddd")
    if filled:
        draw.rectangle((x, y, x + filled - 1, y + _BAR - 1), fill="#2a7f3f")


def plan_sheet(
    image: tuple[int, int],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    caption: str = "",
    bars: bool = False,
    smallest: int = 96,
) -> SheetPlan:
    """Where everything goes: labels are measured and wrapped, so that none touches another or is cut."""
    width, height = _cell_size(image, len(rows), len(columns), smallest)
    font = ImageFont.load_default(max(12, min(28, width // 14)))
    margin = _margin(rows, font, max(width, 160))
    across = margin + len(columns) * (width + _GAP)
    heading = _label(title, _GAP, _GAP, across - 2 * _GAP, font)
    top = heading.y + heading.height + (_GAP if title else 0)
    heads = [_label(name, margin + i * (width + _GAP), top, width, font) for i, name in enumerate(columns)]
    y = top + max(label.height for label in heads) + _GAP
    corners, sides = [], []
    for name in rows:
        side = _label(name, _GAP, y, margin - 2 * _GAP, font)
        sides.append(side)
        corners += [(margin + i * (width + _GAP), y) for i in range(len(columns))]
        y += max(height + (_BAR + 2 if bars else 0), side.height) + _GAP
    below = _label(caption, _GAP, y, across - 2 * _GAP, font)
    labels = tuple(label for label in (heading, *heads, *sides, below) if label.lines)
    return SheetPlan(
        (across, y + (below.height + _GAP if caption else 0)), (width, height), tuple(corners), labels, font
    )


def _cell_size(image: tuple[int, int], rows: int, columns: int, smallest: int) -> tuple[int, int]:
    factor = max(1, -(-smallest // image[0]))
    width, height = image[0] * factor, image[1] * factor
    shrink = max(1.0, columns * width / _WIDEST, rows * height / _WIDEST)
    return max(_LEAST_CELL, int(width / shrink)), max(_LEAST_CELL, int(height / shrink))


def _margin(rows: Sequence[str], font: _Font, most: int) -> int:
    longest = max((font.getlength(label) for label in rows), default=0)
    return min(most, int(longest) + 1) + 2 * _GAP if longest else _GAP


def _label(text: str, x: int, y: int, width: int, font: _Font) -> Label:
    lines = tuple(wrap_text(text, font, width))
    longest = max((font.getlength(line) for line in lines), default=0)
    return Label(lines, x, y, int(longest) + 1, len(lines) * _line_height(font))


def _line_height(font: _Font) -> int:
    return int(font.getbbox("Ag|")[3]) + 3


def wrap_text(text: str, font: _Font, width: int) -> list[str]:
    """Lines no wider than ``width`` pixels, broken between words, and inside a word that is wider alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines += _pieces(word, font, width)
    return lines


def _pieces(word: str, font: _Font, width: int) -> list[str]:
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces
