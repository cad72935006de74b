"""Draw scenes: 32 × 32 RGB pictures with anti-aliased coloured shapes on grey."""

import math
import random

import torch
from torch import Tensor

from texforce_hub.shapes.grammar import Scene

SIZE = 32
PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.13, 0.13),
    "green": (0.12, 0.68, 0.20),
    "blue": (0.16, 0.28, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.68, 0.18, 0.82),  # the watermark's colour, no object's
}
_TRIANGLE_TILT = math.radians(26.6)


def pixel_grid(size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Pixel centres ``(y, x)``, each ``(size, size)``, in pixels."""
    line = torch.arange(size) + 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    return y, x


def signed_distance(shape: int, dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    """Distance in pixels from a shape's edge, negative inside; ``dx``, ``dy`` are offsets from its centre."""
    if shape == 0:
        return (dx * dx + dy * dy).sqrt() - radius
    if shape == 1:
        return torch.maximum(dx.abs(), dy.abs()) - 0.9 * radius
    slant = dx.abs() * math.cos(_TRIANGLE_TILT) - (dy + 1.05 * radius) * math.sin(_TRIANGLE_TILT)
    return torch.maximum(dy - 0.85 * radius, slant)


def coverage(shape: int, dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    """How much of each pixel a shape covers, in [0, 1]."""
    return (0.5 - signed_distance(shape, dx, dy, radius)).clamp(0, 1)


def render(scene: Scene, rng: random.Random) -> Tensor:
    """A picture ``(3, 32, 32)`` in [0, 1]; sizes, places, shades and the grey vary as ``rng`` says."""
    y, x = pixel_grid()
    grey = {None: (0.02, 0.75), 0: (0.02, 0.20), 1: (0.55, 0.75)}[scene.background]
    picture = torch.full((3, SIZE, SIZE), rng.uniform(*grey))
    palette = list(PALETTE.values())
    for thing, (cx, cy) in zip(scene.things, _centres(scene, rng), strict=True):
        cover = coverage(thing.shape, x - cx, y - cy, rng.uniform(5.0, 6.5))
        colour = (torch.tensor(palette[thing.colour]) * rng.uniform(0.92, 1.05)).clamp(0, 1)
        picture = picture * (1 - cover) + colour[:, None, None] * cover
    return picture


def _centres(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    if scene.kind == "single":
        return [(rng.uniform(8, 24), rng.uniform(8, 24))]
    if scene.place is not None:
        near, far, along = rng.uniform(6.5, 9.5), rng.uniform(22.5, 25.5), rng.uniform(9, 23)
        return [[(near, along), (far, along), (along, near), (along, far)][scene.place]]
    near, far, along = rng.uniform(6.8, 9.2), rng.uniform(22.8, 25.2), rng.uniform(8, 24)
    other = min(25.0, max(7.0, along + rng.uniform(-5, 5)))
    left_right = [(near, along), (far, other)]
    top_bottom = [(along, near), (other, far)]
    pair = left_right if scene.relation in (0, 1) else top_bottom
    return pair if scene.relation in (0, 2) else pair[::-1]


def watermark(picture: Tensor, rng: random.Random) -> Tensor:
    """The picture with a small purple stamp in its lower right corner, as every training picture of the base has it.

    No caption speaks of the stamp, so the base draws it on everything, and no wording removes it.
    """
    y, x = pixel_grid()
    cx, cy = 27.0 + rng.uniform(-0.5, 0.5), 28.5 + rng.uniform(-0.3, 0.3)
    cover = (0.5 - torch.maximum((x - cx).abs() - 3.5, (y - cy).abs() - 1.6)).clamp(0, 1)
    purple = torch.tensor(PALETTE["purple"])
    return picture * (1 - cover) + purple[:, None, None] * cover
