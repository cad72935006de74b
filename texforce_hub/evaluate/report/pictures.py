"""Pictures as text inside a page: small enough together, each as WebP or PNG, whichever is smaller."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from texforce_hub.hub.pictures import open_picture

SIDES = (512, 384, 320, 256, 192, 128, 96, 64)
"""The longer sides, in pixels, that pictures are made smaller to: the first at which all of them fit."""
_LOSSLESS = 64  # pixels; up to here WebP keeps every pixel
_QUALITY = 82
_SAMPLE = 12  # pictures, evenly spread, by which the size of all is judged beforehand
_MARGIN = 1.1


@dataclass(frozen=True, slots=True)
class Embedded:
    """A picture as an address that needs no file, and its size in pixels."""

    address: str
    width: int
    height: int


def embed(image: Image.Image, *, side: int = SIDES[0]) -> Embedded:
    """A picture whose longer side has at most ``side`` pixels."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    data, kind = min(_encodings(image), key=lambda encoding: len(encoding[0]))
    return Embedded(f"data:image/{kind};base64,{b64encode(data).decode('ascii')}", *image.size)


def _encodings(image: Image.Image) -> Iterable[tuple[bytes, str]]:
    lossless = max(image.size) <= _LOSSLESS
    settings = {"lossless": True, "quality": 50, "method": 3} if lossless else {"quality": _QUALITY, "method": 4}
    for kind, how in (("webp", settings), ("png", {"optimize": True} if lossless else {"compress_level": 1})):
        buffer = BytesIO()
        image.save(buffer, format=kind.upper(), **how)
        yield buffer.getvalue(), kind


def embed_all(paths: Sequence[Path], *, budget: int) -> tuple[dict[Path, Embedded], int]:
    """Every picture, and the longest side at which all of them together take at most ``budget`` bytes of text.

    Where even the smallest side is too large, fewer than all come back: those that fit, in their order.

    Raises:
        ConfigError: one cannot be read.
    """
    unique = list(dict.fromkeys(paths))
    some = [open_picture(path) for path in unique[:: max(1, len(unique) // _SAMPLE)]]
    largest = max((max(image.size) for image in some), default=0)
    sides = [SIDES[0], *(side for side in SIDES[1:] if side < largest)]
    for side in sides[:-1]:
        guess = sum(len(embed(image, side=side).address) for image in some) * len(unique) / len(some)
        embedded = _embed_within(unique, side, budget) if guess < budget * _MARGIN else {}
        if len(embedded) == len(unique):
            return embedded, side
    return _embed_within(unique, sides[-1], budget), sides[-1]


def _embed_within(paths: Sequence[Path], side: int, budget: int) -> dict[Path, Embedded]:
    embedded: dict[Path, Embedded] = {}
    for path in paths:
        picture = embed(open_picture(path), side=side)
        budget -= len(picture.address)
        if budget < 0:
            break
        embedded[path] = picture
    return embedded
