"""Tensors as pictures."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from texforce_hub.images.sheet import contact_sheet


def as_picture(image: Tensor) -> Image.Image:
    """``(3, h, w)`` in [0, 1] as a picture."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def column_sheet(columns: Sequence[Tensor], *, rows: Sequence[str], names: Sequence[str]) -> Image.Image:
    """A contact sheet from its columns, each ``(len(rows), 3, h, w)`` in [0, 1]."""
    pictures = [as_picture(column[i]) for i in range(len(rows)) for column in columns]
    return contact_sheet(pictures, rows=rows, columns=names)
