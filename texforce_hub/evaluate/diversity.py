"""How different the pictures of one prompt are, from seed to seed, by their pixels alone."""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from PIL import Image

_SIDE = 64
"""Pixels of the longer side at which pictures are compared: composition and colours count, grain does not."""


def shrink(picture: Image.Image) -> np.ndarray:
    """A picture's colours by area averages, ``(h, w, 3)`` in [0, 1], float32, at most 64 pixels a side."""
    factor = math.ceil(max(picture.size) / _SIDE)
    return np.asarray(picture.convert("RGB").reduce(factor), np.float32) / 255


def spread(pictures: Sequence[np.ndarray]) -> float:
    """The mean, over all pairs, of the root mean square difference of two pictures ``(h, w, 3)``; in [0, 1].

    0: they are all the same; two pictures of noise, black or white at every pixel, are 0.7 apart. One picture gives 0.
    """
    distances = [float(np.sqrt(np.square(a - b).mean())) for a, b in combinations(pictures, 2)]
    return float(np.mean(distances)) if distances else 0.0
