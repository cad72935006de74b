"""When an adapter acts: early, late, over a ramp; and two that take turns or guide together instead of being added.

python examples/07_schedule.py --adapter shapes-colour --adapter shapes-shape --output demo/schedule
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from texforce_hub import apply_adapter, load_pipeline
from texforce_hub.generate.draw import DrawSettings, generate_images
from texforce_hub.generate.images.sheet import contact_sheet

PROMPTS = ("a lime disc", "a crimson block")


def main(adapters: Sequence[str], output: Path) -> Path:
    """Draw, print how far each column is from the base, and give the sheet."""
    pipe, settings = load_pipeline("shapes"), DrawSettings(PROMPTS, inference_steps=10, guidance=5.0)
    first, both = adapters[0], list(adapters[:2])
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "always": (first, {}),
        "early": (first, {"schedule": "[0-0.4]"}),
        "late": (first, {"schedule": "[0.6-1]"}),
        "ramp": (first, {"schedule": "0@0,1@0.5"}),
        "added": (both, {}),
        "average": (both, {"composite": "average"}),
        "switch": (both, {"composite": "switch"}),
    }
    columns = {"base": generate_images(pipe, settings)}
    for name, (stack, how) in ways.items():
        with apply_adapter(pipe, stack, **how):
            columns[name] = generate_images(pipe, settings)
        print(f"{name}: {_distance(columns[name], columns['base']):.3f} from the base")
    cells = [column[row] for row in range(len(PROMPTS)) for column in columns.values()]
    output.mkdir(parents=True, exist_ok=True)
    sheet = output / "sheet.png"
    contact_sheet(cells, rows=PROMPTS, columns=list(columns)).save(sheet)
    return sheet


def _distance(some: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """The mean difference of two columns' pixels, in [0, 1]."""
    pairs = [(np.asarray(a, float), np.asarray(b, float)) for a, b in zip(some, others, strict=True)]
    return float(np.mean([np.abs(a - b).mean() / 255 for a, b in pairs]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--output", type=Path, default=Path("demo/07_schedule"))
    options = parser.parse_args()
    print(main(options.adapter or ["shapes-colour", "shapes-shape"], options.output))
