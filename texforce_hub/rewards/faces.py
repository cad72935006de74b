# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["mediapipe==0.10.14", "numpy==1.26.4", "pillow==12.0.0", "protobuf==4.25.8"]
# [tool.texforce-hub]
# only-these = true
# licence = "Apache-2.0 (MediaPipe and the models in its wheel)"
# ///
"""How whole the faces in a picture are, by MediaPipe's face detector and face mesh; ``env:faces``."""

from collections.abc import Sequence

from texforce_hub.rewards.detector import FACES, Detector, Found, score_pictures
from texforce_hub.rewards.landmarks import Picture, inside, measure_sharpness, measure_symmetry
from texforce_hub.rewards.wire import Pixels

_DETECTOR = Detector(FACES)


def faces(images: Pixels, prompts: Sequence[str]) -> Pixels:
    """Scores ``(b,)`` in [0, 1] of pictures ``(b, 3, h, w)`` in [0, 1]: the mean over the faces, 0 without one.

    Prompts are ignored.
    """
    del prompts
    return score_pictures(_DETECTOR, images, score_face)


def score_face(picture: Picture, face: Found) -> float:
    """A face's score in [0, 1], a product: detected, really there, inside the picture, symmetric, sharp."""
    height, width = picture.shape[:2]
    certain = face.detection * face.presence * inside(face.points, height, width)
    return certain * measure_symmetry(face.points) * measure_sharpness(picture, face.points)
