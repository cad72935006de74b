"""Hands and faces: what their scores are made of, by recorded landmarks; for real where the environment is there."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import detectors
from benchmarks.drawn_hand import FINGERS, draw_hand
from texforce_hub.rewards.detector import Detector, Found, score_pictures
from texforce_hub.rewards.environment.build import is_built
from texforce_hub.rewards.environment.spec import EnvironmentRef
from texforce_hub.rewards.faces import score_face
from texforce_hub.rewards.hands import score_hand
from texforce_hub.rewards.landmarks import (
    count_fingers,
    inside,
    measure_sharpness,
    measure_symmetry,
    weigh_bones,
)
from texforce_hub.rewards.reward import resolve_reward

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "rewards" / "landmarks.json").read_text())
PHOTOGRAPH = np.asarray(detectors.faces()["the photograph"])
HAND = np.asarray(draw_hand())


def find(name):
    said = RECORDED[name]
    world = None if said["world"] is None else np.array(said["world"])
    return Found(said["detection"], said["presence"], np.array(said["points"]), world)


def turned(points, degrees):
    a, b = np.deg2rad(degrees), np.deg2rad(degrees / 2)
    roll = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    yaw = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    return points @ (roll @ yaw).T


def test_five_fingers_are_counted_at_any_size_and_angle():
    points = find("whole").points
    assert count_fingers(points) == pytest.approx(5)
    assert count_fingers(points * 0.1 + 40) == pytest.approx(5)
    flat = turned(points * (1, 1, 0), 0)
    assert count_fingers(flat[:, :2] @ np.array([[0.0, 1.0], [-1.0, 0.0]])) == pytest.approx(5)


@pytest.mark.parametrize("name", FINGERS)
def test_a_finger_that_is_missing_is_not_counted(name):
    """The landmark model draws it all the same: bent, or along its neighbour."""
    assert count_fingers(find(f"no {name}").points) < 4.8


def test_two_fingers_in_one_place_are_one():
    points = find("whole").points
    points[13:17] = points[9:13] + 1.0
    assert count_fingers(points) < 4.2


def test_a_finger_of_another_length_weighs_less():
    points = find("whole").world
    assert weigh_bones(points) == 1
    assert weigh_bones(turned(points, 50) * 3) == pytest.approx(1)
    for factor in (0.3, 2.5):
        odd = points.copy()
        odd[18:21] = odd[17] + (odd[18:21] - odd[17]) * factor
        assert weigh_bones(odd) < 0.7


def test_a_face_is_as_symmetric_wherever_it_looks_and_less_so_with_an_eye_moved():
    points = find("face").points
    straight = measure_symmetry(points)
    assert 0.7 < straight < 1
    assert measure_symmetry(turned(points, 40) * 2 + 100) == pytest.approx(straight)
    assert measure_symmetry(points * (-1, 1, 1)) == pytest.approx(straight)
    size = np.ptp(points[:, 1])
    lower = points.copy()
    lower[[33, 133, 159, 145], 1] += 0.1 * size
    assert measure_symmetry(lower) < 0.8 * straight


def test_blur_takes_sharpness_away_step_by_step_at_any_size():
    from PIL import Image, ImageFilter

    points = find("whole").points
    pictures = [Image.fromarray(HAND).filter(ImageFilter.GaussianBlur(radius)) for radius in (0, 1, 2, 4, 8, 16)]
    values = [measure_sharpness(np.asarray(picture), points) for picture in pictures]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.9 > 0.6 > values[3]
    half = np.asarray(Image.fromarray(HAND).resize((256, 256), Image.Resampling.LANCZOS))
    assert measure_sharpness(half, points / 2) == pytest.approx(values[0], abs=0.15)
    assert measure_sharpness(np.full((8, 8, 3), 7, np.uint8), np.zeros((21, 3))) == 0


def test_landmarks_outside_the_picture_count_against_it():
    points = np.array([[-1, 5, 0], [5, 5, 0], [5, 10, 0], [9.5, 0, 0]])
    assert inside(points, 10, 10) == 0.5


def test_scores_are_in_0_to_1_and_a_hand_with_less_to_it_has_less():
    whole = score_hand(HAND, find("whole"))
    assert 0.7 < whole < 1
    for name in FINGERS:
        assert 0 < score_hand(HAND, find(f"no {name}")) < whole - 0.05
    assert 0.5 < score_face(PHOTOGRAPH, find("face")) < 1


class Pretended(Detector):
    def __init__(self, found):
        self.found = found

    def find(self, picture):
        return self.found


def test_a_picture_has_the_mean_of_what_is_in_it_and_0_without_any():
    images = (HAND.transpose(2, 0, 1)[None] / 255).astype(np.float32)
    both = Pretended([find("whole"), find("no ring")])
    scores = [score_hand(HAND, hand) for hand in both.found]
    assert score_pictures(both, images, score_hand)[0] == pytest.approx(np.mean(scores))
    assert score_pictures(Pretended([]), images, score_hand).tolist() == [0]


NOT_HERE = "env:hands is not installed here: texforce-hub rewards check env:hands --yes"


def is_here():
    return is_built(EnvironmentRef.parse("env:hands").requirements())


@pytest.mark.skipif(not is_here(), reason=NOT_HERE)
@pytest.mark.parametrize("name", ["hands", "faces"])
def test_what_is_wrong_lowers_the_score_of_a_real_detector(name):
    reward = resolve_reward(f"env:{name}")
    whole, *spoiled = getattr(detectors, name)().items()
    scores = {title: float(reward(detectors.to_tensor(picture), [""])[0]) for title, picture in [whole, *spoiled]}
    best = scores.pop(whole[0])
    assert 0.7 < best < 1
    assert max(scores.values()) < best - 0.02
    assert scores["noise alone"] == scores["blank"] == 0
