"""Blend adapters by weight, change the weights without reading anything again, subtract one.

python examples/02_stack.py --adapter shapes-colour --adapter shapes-shape --output demo/stack
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from texforce_hub import apply_adapter, load_pipeline
from texforce_hub.generate.draw import DrawSettings, generate_images
from texforce_hub.generate.images.sheet import contact_sheet

PROMPTS = ("a red circle", "a blue square")


def main(adapters: Sequence[str], output: Path) -> Path:
    """Draw, and give the sheet that shows it."""
    pipe = load_pipeline("shapes")
    settings = DrawSettings(tuple(PROMPTS), inference_steps=15, guidance=5.0)
    groups, columns = [], []
    with apply_adapter(pipe, list(adapters)) as applied:
        for weights in ([1.0] * len(adapters), [0.5] * len(adapters), [1.0] + [-0.5] * (len(adapters) - 1)):
            applied.set_weights(weights)
            groups.append(generate_images(pipe, settings))
            columns.append(" / ".join(f"{weight:g}" for weight in weights))
    cells_by_row = [image for row in zip(*groups, strict=True) for image in row]
    output.mkdir(parents=True, exist_ok=True)
    sheet = output / "sheet.png"
    contact_sheet(cells_by_row, rows=PROMPTS, columns=columns).save(sheet)
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--output", type=Path, default=Path("demo/02_stack"))
    options = parser.parse_args()
    print(main(options.adapter or ["shapes-colour", "shapes-shape"], options.output))
