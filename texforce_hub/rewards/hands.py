# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["mediapipe==0.10.14", "numpy==1.26.4", "pillow==12.0.0", "protobuf==4.25.8"]
# [tool.texforce-hub]
# only-these = true
# licence = "Apache-2.0 (MediaPipe and the models in its wheel)"
# ///
"""How whole the hands in a picture are, by MediaPipe's palm detector and hand landmarks; ``env:hands``."""

from collections.abc import Sequence

from texforce_hub.rewards.detector import HANDS, Detector, Found, score_pictures
from texforce_hub.rewards.landmarks import Picture, count_fingers, inside, measure_sharpness, weigh_bones
from texforce_hub.rewards.wire import Pixels

_DETECTOR = Detector(HANDS)


def hands(images: Pixels, prompts: Sequence[str]) -> Pixels:
    """Scores ``(b,)`` in [0, 1] of pictures ``(b, 3, h, w)`` in [0, 1]: the mean over the hands, 0 without one.

    Prompts are ignored.
    """
    del prompts
    return score_pictures(_DETECTOR, images, score_hand)


def score_hand(picture: Picture, hand: Found) -> float:
    """A hand's score in [0, 1], a product: detected, really there, inside the picture, five fingers, of their lengths,
    sharp.
    """
    height, width = picture.shape[:2]
    certain = hand.detection * hand.presence * inside(hand.points, height, width)
    bones = weigh_bones(hand.points if hand.world is None else hand.world)
    return certain * count_fingers(hand.points) / 5 * bones * measure_sharpness(picture, hand.points)
