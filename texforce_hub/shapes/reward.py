"""How well a picture shows its caption, from the pixels alone.

Soft colour masks are matched against the outlines of the shapes: colour, shape and place all have to be
right. The score is a differentiable function of the picture, so the same code is the reward of
reinforcement learning, the loss of direct fine-tuning (ReFL), and the metric.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from texforce_hub.shapes.grammar import COLOURS, SHAPES, Scene
from texforce_hub.shapes.render import PALETTE, SIZE, coverage, pixel_grid

RADII = (4.8, 5.4, 6.0)
_KERNEL = 17
_PADDED = SIZE + _KERNEL - 1


def score_scenes(pictures: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Scores in [0, 1], one per picture.

    A thing's score is its presence × the certainty of its shape, a pair's the mean of its two. With a
    place or a relation it is multiplied by ``0.4 + 0.6 · there``, where ``there`` says how clearly things
    are where they should be (8 px past the middle, or between the two, is full marks); then by
    ``1 - 0.6 · clutter``, where clutter is coloured area that no caption asked for.

    Shapes:
        pictures: ``(b, 3, 32, 32)`` in [0, 1]; larger square pictures are averaged down. Returns ``(b,)``.
    """
    pictures = F.adaptive_avg_pool2d(pictures.float(), SIZE) if pictures.shape[-1] != SIZE else pictures.float()
    masks = colour_masks(pictures)
    device = pictures.device
    things = torch.tensor([[_indices(s, 0), _indices(s, -1)] for s in scenes], device=device)  # (b, 2, 2)
    rows = torch.arange(len(scenes), device=device)
    two = torch.tensor([s.kind == "pair" for s in scenes], device=device)
    placed = torch.tensor([s.kind != "single" for s in scenes], device=device)
    side = torch.tensor([s.relation if s.relation is not None else s.place or 0 for s in scenes], device=device)

    present1, certain1, x1, y1 = _find(masks[rows, things[:, 0, 0]], things[:, 0, 1])
    present2, certain2, x2, y2 = _find(masks[rows, things[:, 1, 0]], things[:, 1, 1])
    middle = SIZE / 2
    apart = torch.stack([x2 - x1, x1 - x2, y2 - y1, y1 - y2], 1)
    off_centre = 2 * torch.stack([middle - x1, x1 - middle, middle - y1, y1 - middle], 1)
    where = torch.where(two[:, None], apart, off_centre)[rows, side]

    thing = torch.where(two, (present1 * certain1 + present2 * certain2) / 2, present1 * certain1)
    there = (where / 8).clamp(0, 1)
    score = thing * torch.where(placed, 0.4 + 0.6 * there, 1.0)
    return score * (1 - 0.6 * _clutter(masks, things[:, :, 0]))


def _indices(scene: Scene, which: int) -> list[int]:
    return [scene.things[which].colour, scene.things[which].shape]


def colour_masks(pictures: Tensor) -> Tensor:
    """Soft membership of every pixel in each palette colour, ``(b, 3, h, w)`` → ``(b, 5, h, w)``.

    Compared by chroma, brightness removed; what is left of 1 belongs to grey, the background.
    """
    chroma = pictures - pictures.mean(1, keepdim=True)
    palette = torch.tensor(list(PALETTE.values()), device=pictures.device)
    wanted = palette - palette.mean(1, keepdim=True)
    far = ((chroma[:, None] - wanted[None, :, :, None, None]) ** 2).sum(2)
    grey = (chroma**2).sum(1, keepdim=True)
    return torch.softmax(-torch.cat([far, grey], 1) / 0.035, 1)[:, :-1]


def _clutter(masks: Tensor, named: Tensor) -> Tensor:
    """Unasked-for colour, 0 up to 12 px and 1 from 60 px on; ``named`` holds the asked-for colours ``(b, 2)``."""
    unasked = torch.ones(masks.shape[:2], device=masks.device).scatter(1, named, 0.0)
    area = (masks * unasked[:, :, None, None]).sum((1, 2, 3))
    return ((area - 12) / 48).clamp(0, 1)


def _find(mask: Tensor, shape: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In a colour's mask ``(b, h, w)``: is anything there, is it that shape, and where (pixels), each ``(b,)``."""
    overlap = _overlaps(mask).flatten(2).amax(2).view(len(mask), len(SHAPES), len(RADII)).amax(2)
    present = ((overlap.amax(1) - 0.35) / 0.40).clamp(0, 1)
    certain = torch.softmax(overlap * 60, 1).gather(1, shape[:, None])[:, 0]
    y, x = (grid.to(mask.device) for grid in pixel_grid())
    area = mask.sum((1, 2)) + 1e-3
    return present, certain, (mask * x).sum((1, 2)) / area, (mask * y).sum((1, 2)) / area


def _overlaps(mask: Tensor) -> Tensor:
    """Intersection over union with every template at every position: ``(b, h, w)`` → ``(b, shapes·radii, h, w)``."""
    outlines, windows, areas = _templates(mask.device)
    spectrum = torch.fft.rfft2(F.pad(mask, (0, _PADDED - SIZE, 0, _PADDED - SIZE)))[:, None]
    shared = torch.fft.irfft2(spectrum * outlines, s=(_PADDED, _PADDED))[..., :SIZE, :SIZE]
    nearby = torch.fft.irfft2(spectrum * windows, s=(_PADDED, _PADDED))[..., :SIZE, :SIZE]
    overlaps: Tensor = shared / (nearby + areas[:, None, None] - shared)
    return overlaps


@cache
def _templates(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Conjugate spectra of the outlines and of the windows around them, and the outlines' areas."""
    line = torch.arange(_KERNEL) - _KERNEL // 2 + 0.0
    y, x = torch.meshgrid(line, line, indexing="ij")
    outlines = torch.stack([coverage(s, x, y, r) for s in range(len(SHAPES)) for r in RADII])
    window = [(torch.maximum(x.abs(), y.abs()) <= math.ceil(r) + 1).float() for r in RADII]
    windows = torch.stack(window * len(SHAPES))
    spectra = [_spectrum(kernels).to(device) for kernels in (outlines, windows)]
    return spectra[0], spectra[1], outlines.sum((1, 2)).to(device)


def _spectrum(kernels: Tensor) -> Tensor:
    padded = torch.zeros(len(kernels), _PADDED, _PADDED)
    padded[:, :_KERNEL, :_KERNEL] = kernels
    half = _KERNEL // 2
    spectrum: Tensor = torch.fft.rfft2(padded.roll((-half, -half), (1, 2)))
    return spectrum.conj()


assert list(PALETTE)[: len(COLOURS)] == list(COLOURS), "colour indices of the grammar are rows of the palette"
