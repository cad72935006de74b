"""How whole a hand or a face is, by its landmarks and by how sharp it is; arrays alone."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Points = NDArray[np.float64]
Picture = NDArray[np.uint8]

WRIST, FIRST_OF_MIDDLE = 0, 9
_FINGERS = np.arange(1, 21).reshape(5, 4)  # thumb, index, middle, ring, little; each from its base to its tip
_REACH = np.array([0.80, 0.85, 0.95, 0.88, 0.65])  # of a stretched finger, base to tip, in lengths of the palm
_GONE, _THERE = 0.35, 0.65  # of that reach: nothing of a finger is seen below the one, all of it above the other
_APART = 0.16  # palms between two fingers beyond their first joints that are not one
_LENGTH = np.array([0.83, 0.88, 1.0, 0.90, 0.73])  # of a finger's bones together, against the middle finger's
_TOLERANCE = 0.25  # of a ratio's logarithm: hands differ, and so do the angles that they are seen from

_PAIRS = (
    (33, 263), (133, 362), (159, 386), (145, 374), (61, 291), (70, 300), (105, 334), (107, 336), (234, 454), (98, 327),
    (50, 280), (172, 397), (93, 323), (58, 288), (37, 267), (84, 314), (103, 332), (127, 356), (205, 425),
)  # fmt: skip
"""Landmarks of a face, right and left: eyes, mouth, brows, cheeks, nostrils, jaw, lips, temples."""
_MIDDLE = (10, 151, 9, 168, 6, 197, 195, 5, 4, 1, 2, 0, 17, 199, 175, 152)  # from the forehead to the chin
_HERE = [index for pair in _PAIRS for index in pair] + list(_MIDDLE)
_MIRRORED = [index for pair in _PAIRS for index in reversed(pair)] + list(_MIDDLE)
_CROOKED = 0.05  # of a face's size: an asymmetry that takes away 63 %

_SIDE = 128  # pixels that a crop is brought to, so that sharpness is that of a hand or face, not of the picture
_WINDOW = 9  # pixels of the blur that a sharp crop has much to lose by
_SHARP = 0.5  # share that is lost where a photograph is in focus


def count_fingers(points: Points) -> float:
    """Fingers that can be seen stretched out and apart, 0 to 5; one that is partly bent counts partly.

    The landmark model draws 21 points wherever it sees a hand: a missing finger as one that is bent to the palm, or
    along its neighbour. So what is counted is how far each tip is from the finger's base, and from the next finger.

    Args:
        points: ``(21, 2 or more)`` in pixels.
    """
    flat = points[:, :2]
    palm = max(float(np.linalg.norm(flat[FIRST_OF_MIDDLE] - flat[WRIST])), 1e-6)
    chains = flat[_FINGERS] / palm
    reach = np.linalg.norm(chains[:, -1] - chains[:, 0], axis=-1)
    seen = np.clip((reach / _REACH - _GONE) / (_THERE - _GONE), 0, 1)
    upper = _sample(chains[:, 1:])
    gaps = np.linalg.norm(upper[1:, :, None] - upper[:-1, None], axis=-1).min((1, 2))
    seen[1:] *= np.clip(gaps / _APART, 0, 1)
    return float(seen.sum())


def _sample(chains: Points) -> Points:
    """Points along chains of joints, ``(fingers, joints, 2)`` to ``(fingers, more, 2)``."""
    first, second = chains[:, :-1, None], chains[:, 1:, None]
    return (first + (second - first) * np.linspace(0, 1, 8)[:, None]).reshape(len(chains), -1, 2)


def weigh_bones(points: Points) -> float:
    """How like a hand's the lengths of its fingers are to each other, in (0, 1]; 1 within what hands differ by.

    Args:
        points: ``(21, 3)``, of a body, not of its picture, in which what points at us is short.
    """
    bones = np.linalg.norm(np.diff(points[_FINGERS], axis=1), axis=-1).sum(-1)
    ratios = np.log(np.maximum(bones / max(bones[2], 1e-9), 1e-9) / _LENGTH)
    return float(np.exp(-np.maximum(np.abs(ratios) - _TOLERANCE, 0).sum()))


def measure_symmetry(points: Points) -> float:
    """How like its mirror image a face is, wherever it looks, in (0, 1].

    The mirrored landmarks are turned onto the landmarks as well as can be; what is left, against the face's size, is
    its asymmetry.

    Args:
        points: ``(468, 3)``, all axes on one scale.
    """
    face, mirrored = points[_HERE], points[_MIRRORED] * (-1, 1, 1)
    face, mirrored = face - face.mean(0), mirrored - mirrored.mean(0)
    left, _, right = np.linalg.svd(mirrored.T @ face)
    turn = left @ np.diag([1, 1, np.sign(np.linalg.det(left @ right))]) @ right
    size = max(float(np.sqrt((face**2).sum())), 1e-9)
    return float(np.exp(-np.sqrt(((face - mirrored @ turn) ** 2).sum()) / size / _CROOKED))


def measure_sharpness(picture: Picture, points: Points) -> float:
    """How much of the differences between neighbouring pixels a blur would take away, around landmarks, in [0, 1].

    A picture that is blurred already has little to lose (Crété-Roffet et al. 2007).

    Args:
        picture: ``(h, w, 3)``.
        points: ``(n, 2 or more)`` in pixels; the box around them is what is looked at, as far as it is in the picture.
    """
    height, width = picture.shape[:2]
    low = np.clip(points[:, :2].min(0), 0, (width - 1, height - 1)).astype(int)
    high = np.maximum(np.clip(points[:, :2].max(0), 0, (width, height)).astype(int), low + 1)
    grey = Image.fromarray(picture[low[1] : high[1], low[0] : high[0]].mean(-1).astype(np.float32))
    crop = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), float)
    return min(1.0, min(_lost(crop), _lost(crop.T)) / _SHARP)


def _lost(grey: Points) -> float:
    """The share of differences down the columns that a mean over a window takes away."""
    half = _WINDOW // 2
    padded = np.pad(grey, [(half, half), (0, 0)], mode="edge")
    blurred = np.mean([padded[i : i + len(grey)] for i in range(_WINDOW)], axis=0)
    own, left = (np.abs(np.diff(values, axis=0)) for values in (grey, blurred))
    return float(np.maximum(own - left, 0).sum() / own.sum()) if own.any() else 0.0


def inside(points: Points, height: int, width: int) -> float:
    """The share of landmarks that are in the picture."""
    x, y = points[:, 0], points[:, 1]
    return float(((x >= 0) & (x < width) & (y >= 0) & (y < height)).mean())
