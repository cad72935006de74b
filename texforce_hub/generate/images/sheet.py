"""Pictures side by side, labelled."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from texforce_hub.errors import ConfigError


def as_picture(image: Tensor) -> Image.Image:
    """``(3, h, w)`` in [0, 1] as a picture."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def column_sheet(columns: Sequence[Tensor], *, rows: Sequence[str], names: Sequence[str]) -> Image.Image:
    """A contact sheet from its columns, each ``(len(rows), 3, h, w)`` in [0, 1]."""
    pictures = [as_picture(column[i]) for i in range(len(rows)) for column in columns]
    return contact_sheet(pictures, rows=rows, columns=names)


_GAP = 4
_SMALLEST_CELL = 96  # pixels: tiny pictures are enlarged, so that labels and details can be seen


def contact_sheet(images: Sequence[Image.Image], *, rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """One picture of many, row by row, each row's label on the left and each column's on top.

    Args:
        images: ``len(rows) · len(columns)`` of them, the first row first; all are drawn at the first one's size.

    Raises:
        ConfigError: another number of images.
    """
    if not images or len(images) != len(rows) * len(columns):
        raise ConfigError(f"{len(images)} images for a sheet of {len(rows)} rows and {len(columns)} columns")
    factor = max(1, -(-_SMALLEST_CELL // images[0].width))
    width, height = images[0].width * factor, images[0].height * factor
    font = ImageFont.load_default(max(11, width // 16))
    margin = _label_width(rows, font, limit=2 * width)
    head = _line_height(font) * max(len(_wrapped(label, font, width)) for label in columns) + 2 * _GAP
    size = (margin + len(columns) * (width + _GAP), head + len(rows) * (height + _GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns):
        _write(draw, (margin + column * (width + _GAP), _GAP), label, font, width)
    for row, label in enumerate(rows):
        _write(draw, (_GAP, head + row * (height + _GAP)), label, font, margin - 2 * _GAP)
    for number, image in enumerate(images):
        row, column = divmod(number, len(columns))
        cell = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(cell, (margin + column * (width + _GAP), head + row * (height + _GAP)))
    return sheet


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _label_width(labels: Sequence[str], font: _Font, limit: int) -> int:
    longest = max((font.getlength(label) for label in labels), default=0)
    return min(limit, int(longest) + 2 * _GAP) if longest else 0


def _line_height(font: _Font) -> int:
    return int(font.getbbox("Ag")[3]) + 2


def _wrapped(text: str, font: _Font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, font: _Font, width: int) -> None:
    for number, line in enumerate(_wrapped(text, font, width)):
        draw.text((corner[0], corner[1] + number * _line_height(font)), line, fill="black", font=font)
