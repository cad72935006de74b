"""A hand, drawn: capsules that run into each other, lit, with creases and a wrist; fingers can be left out."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Field = NDArray[np.float64]
Point = tuple[float, float]

FINGERS: dict[str, tuple[Point, Point, Point, Point]] = {
    "thumb": ((-0.20, 0.42), (-0.55, 0.20), (-0.78, -0.02), (-0.92, -0.22)),
    "index": ((-0.30, -0.20), (-0.40, -0.62), (-0.46, -0.90), (-0.50, -1.12)),
    "middle": ((-0.02, -0.26), (-0.04, -0.74), (-0.05, -1.06), (-0.055, -1.30)),
    "ring": ((0.24, -0.20), (0.32, -0.62), (0.37, -0.92), (0.41, -1.14)),
    "little": ((0.46, -0.06), (0.60, -0.36), (0.68, -0.58), (0.74, -0.76)),
}
"""Joints from the base to the tip; lengths in those of the palm, y down."""
_WIDTHS = {
    "thumb": (0.22, 0.165, 0.14, 0.10),
    "index": (0.155, 0.135, 0.118, 0.088),
    "middle": (0.16, 0.14, 0.122, 0.092),
    "ring": (0.155, 0.13, 0.114, 0.086),
    "little": (0.135, 0.11, 0.098, 0.074),
}
_PALM: tuple[tuple[Point, Point, float, float], ...] = (
    ((-0.22, 0.62), (-0.28, -0.14), 0.30, 0.22),
    ((0.0, 0.66), (-0.02, -0.18), 0.32, 0.22),
    ((0.2, 0.62), (0.24, -0.14), 0.30, 0.22),
    ((0.22, 0.6), (0.42, 0.0), 0.28, 0.20),
    ((-0.12, 0.55), (-0.34, 0.32), 0.3, 0.24),
    ((0.0, 0.8), (0.0, 1.9), 0.29, 0.33),
)
_LINES = ((-0.52, 0.55, 0.52, -1.35, 0.35), (0.1, -0.42, 0.55, 0.5, 2.3), (-0.05, -0.75, 0.75, 0.8, 2.1))
"""Creases of the palm: arcs by centre, radius and the angles between which they run."""
_SKIN, _LIGHT = (0.86, 0.63, 0.51), np.array([-0.45, -0.55, 0.7])


def draw_hand(size: int = 512, *, without: Collection[str] = (), scale: float = 0.30) -> Image.Image:
    """An open right hand with its palm to us, always the same; ``scale``: the palm's length in sides of the picture."""
    y, x = (np.mgrid[0:size, 0:size] / size - np.array([0.47, 0.5])[:, None, None]) / scale
    fingers = {name: joints for name, joints in FINGERS.items() if name not in without}
    parts = [_melt([_capsule(x, y, *bone) for bone in _PALM], 60)]
    for name, joints in fingers.items():
        widths = _WIDTHS[name]
        bones = zip(joints, joints[1:], widths, widths[1:])
        parts.append(_melt([_capsule(x, y, *bone) for bone in bones], 60))
    height = _melt(parts, 90)
    colour = _shade(height, size * scale)
    for name, joints in fingers.items():
        for before, joint, after, width in zip(joints, joints[1:], joints[2:], _WIDTHS[name][1:]):
            colour *= (1 - 0.22 * _crease(x, y, before, joint, after, width))[..., None]
    for line in _LINES:
        colour *= (1 - 0.20 * _arc(x, y, *line))[..., None]
    ground = np.stack([0.49 - 0.03 * y, 0.53 - 0.03 * y, 0.58 - 0.025 * y], -1)
    cover = 1 / (1 + np.exp(-np.clip(height * 300, -50, 50)))[..., None]
    picture = ground * (1 - cover) + colour * cover + _grain(size)[..., None]
    return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))


def _capsule(x: Field, y: Field, start: Point, end: Point, first: float, last: float) -> Field:
    """The height's square of a round bone between two points, whose radius changes; below 0 outside."""
    along = np.array(end) - start
    share = (((x - start[0]) * along[0] + (y - start[1]) * along[1]) / (along @ along)).clip(0, 1)
    distance = (x - start[0] - share * along[0]) ** 2 + (y - start[1] - share * along[1]) ** 2
    height: Field = (first + (last - first) * share) ** 2 - distance
    return height


def _melt(parts: Sequence[Field], sharpness: float) -> Field:
    """The largest, with soft transitions."""
    total: Field = np.log(sum(np.exp(np.clip(sharpness * part, -50, 50)) for part in parts)) / sharpness
    return total


def _shade(height: Field, unit: float) -> Field:
    """Skin under one light, redder in the shade, ``(h, w, 3)``; ``unit``: pixels of a palm."""
    down, right = np.gradient(np.sqrt(np.maximum(height, 1e-5)), 1 / unit)
    normal = np.stack([-right, -down, np.ones_like(right)]) / np.sqrt(right**2 + down**2 + 1)
    light = np.tensordot(_LIGHT / np.linalg.norm(_LIGHT), normal, 1).clip(0, 1)
    colour: Field = np.array(_SKIN) * (0.38 + 0.68 * light)[..., None] + (1 - light)[..., None] * (0.08, 0, -0.02)
    return colour


def _crease(x: Field, y: Field, before: Point, joint: Point, after: Point, width: float) -> Field:
    """A line across a finger at a joint, 1 in its middle."""
    along = (np.array(after) - before) / np.linalg.norm(np.array(after) - before)
    lengthwise = (x - joint[0]) * along[0] + (y - joint[1]) * along[1]
    crosswise = (y - joint[1]) * along[0] - (x - joint[0]) * along[1]
    line: Field = np.exp(-((lengthwise / 0.014) ** 2) - (crosswise / width / 0.8) ** 4)
    return line


def _arc(x: Field, y: Field, left: float, top: float, radius: float, start: float, end: float) -> Field:
    angle = np.arctan2(y - top, x - left)
    line: Field = np.exp(-(((np.hypot(x - left, y - top) - radius) / 0.013) ** 2)) * ((angle > start) & (angle < end))
    return line


def _grain(size: int) -> Field:
    """A little of what a camera adds."""
    grain: Field = np.random.default_rng(0).normal(0, 0.006, (size, size))
    return grain
