"""Draw the same prompts without an adapter, with it attached, and with it fused; then take it off again.

python examples/01_apply.py --adapter shapes-colour --output demo/apply
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
    base = generate_images(pipe, settings)
    with apply_adapter(pipe, adapters[0], weight=0.8) as applied:
        print({type(decision).__name__ for decision in applied.decisions[next(iter(applied.decisions))].values()})
        attached = generate_images(pipe, settings)
    with apply_adapter(pipe, adapters[0], weight=0.8, mode="fuse"):
        fused = generate_images(pipe, settings)
    groups, columns = [base, attached, fused], ["base", "attached", "fused"]
    cells_by_row = [image for row in zip(*groups, strict=True) for image in row]
    output.mkdir(parents=True, exist_ok=True)
    sheet = output / "sheet.png"
    contact_sheet(cells_by_row, rows=PROMPTS, columns=columns).save(sheet)
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--output", type=Path, default=Path("demo/01_apply"))
    options = parser.parse_args()
    print(main(options.adapter or ["shapes-colour"], options.output))
