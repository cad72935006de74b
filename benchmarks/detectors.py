"""What ``env:hands`` and ``env:faces`` say of a hand and a face, and of the same when something is wrong with them.

``python -m benchmarks.detectors`` prints the table of docs/rewards.md and writes the pictures in it. The face is a crop
of NASA's portrait of Eileen Collins, in the public domain, as scikit-image carries it; the hand is drawn.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.drawn_hand import draw_hand
from benchmarks.timing import head, row
from texforce_hub.rewards.reward import resolve_reward

FOLDER = Path(__file__).parents[1] / "docs" / "rewards"
FACE = FOLDER / "astronaut.png"
_TILE, _COLUMNS = 96, 5
_MIDDLE = 92  # the column of the face's middle in its picture

Pictures = Mapping[str, Image.Image]


def main() -> None:
    """Score every picture, print the tables, write a sheet of each."""
    for name, pictures in (("hands", hands()), ("faces", faces())):
        reward = resolve_reward(f"env:{name}")
        head(f"`env:{name}`", "score")
        for title, picture in pictures.items():
            row(title, f"{float(reward(to_tensor(picture), [''])[0]):.3f}")
        print()
        _sheet(pictures).save(FOLDER / f"{name}.png", optimize=True)


def hands() -> Pictures:
    """A hand, and what may be wrong with it."""
    whole = draw_hand()
    gone = {f"no {name}": draw_hand(without=(name,)) for name in ("thumb", "index", "middle", "ring", "little")}
    return {
        "a whole hand": whole,
        **{f"{title} finger" if title != "no thumb" else title: picture for title, picture in gone.items()},
        "its left half, mirrored": _mirror(whole, 256),
        **_spoil(whole),
    }


def faces() -> Pictures:
    """A face, and what may be wrong with it."""
    whole = Image.open(FACE).convert("RGB")
    return {
        "the photograph": whole,
        "its left half, mirrored": _mirror(whole, _MIDDLE),
        "one eye gone": _paint_over(whole),
        "right half lower": _lower(whole),
        "half covered": _cover(whole),
        "turned round": whole.rotate(180),
        **_spoil(whole),
    }


def _spoil(picture: Image.Image) -> Pictures:
    pixels, random = np.asarray(picture, float), np.random.default_rng(0)
    grey = tuple(int(value) for value in pixels.mean((0, 1)))
    noisy = pixels + random.normal(0, 0.2 * 255, pixels.shape)
    return {
        "blurred, 1 pixel": picture.filter(ImageFilter.GaussianBlur(1)),
        "blurred, 4 pixels": picture.filter(ImageFilter.GaussianBlur(4)),
        "under noise": _picture(noisy),
        "noise alone": _picture(random.uniform(0, 255, pixels.shape)),
        "blank": Image.new("RGB", picture.size, grey),
    }


def _mirror(picture: Image.Image, middle: int) -> Image.Image:
    pixels = np.asarray(picture).copy()
    width = min(middle, pixels.shape[1] - middle)
    pixels[:, middle : middle + width] = pixels[:, middle - width : middle][:, ::-1]
    return _picture(pixels)


def _paint_over(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture).copy()
    pixels[90:125, 95:140] = pixels[135:170, 50:95]
    return _picture(pixels)


def _lower(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture).copy()
    pixels[60:200, _MIDDLE:182] = np.roll(pixels, 25, 0)[60:200, _MIDDLE:182]
    return _picture(pixels)


def _cover(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture).copy()
    pixels[:, _MIDDLE:] = 128
    return _picture(pixels)


def _picture(pixels: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """As rewards take it, ``(1, 3, h, w)`` in [0, 1]."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255


def _sheet(pictures: Pictures) -> Image.Image:
    """All of them in the order of the table, row by row."""
    rows = -(-len(pictures) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _TILE, rows * _TILE), "white")
    for i, picture in enumerate(pictures.values()):
        tile = picture.copy()
        tile.thumbnail((_TILE - 4, _TILE - 4), Image.Resampling.LANCZOS)
        sheet.paste(tile, (i % _COLUMNS * _TILE + (_TILE - tile.width) // 2, i // _COLUMNS * _TILE + 2))
    return sheet.quantize(128)


if __name__ == "__main__":
    main()
