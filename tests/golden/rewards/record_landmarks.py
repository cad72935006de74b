"""Record what MediaPipe finds in a drawn hand and in a photograph; run once, in the environment of ``env:hands``.

``ENVIRONMENT/bin/python tests/golden/rewards/record_landmarks.py`` from the repository's root writes landmarks.json.
"""

import json
import runpy
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[3]


def main():
    runpy.run_path(str(ROOT / "texforce_hub" / "rewards" / "environment" / "boot.py"))["lend_package"]()
    sys.path.insert(0, str(ROOT))
    from PIL import Image

    from benchmarks.drawn_hand import FINGERS, draw_hand
    from texforce_hub.rewards.detector import FACES, HANDS, Detector

    hands = {"whole": draw_hand()} | {f"no {name}": draw_hand(without=(name,)) for name in FINGERS}
    found = {name: describe(*Detector(HANDS).find(np.asarray(picture))) for name, picture in hands.items()}
    face = np.asarray(Image.open(ROOT / "docs" / "rewards" / "astronaut.png").convert("RGB"))
    found["face"] = describe(*Detector(FACES).find(face))
    Path(__file__).with_name("landmarks.json").write_text(json.dumps(found) + "\n")


def describe(hand_or_face):
    world = hand_or_face.world
    return {
        "detection": round(hand_or_face.detection, 4),
        "presence": round(hand_or_face.presence, 4),
        "points": hand_or_face.points.round(1).tolist(),
        "world": None if world is None else world.round(4).tolist(),
    }


if __name__ == "__main__":
    main()
