"""Compose a text-encoder adapter with somebody else's fine-tuned U-Net: the paper's two by two.

python examples/03_finetuned_unet.py --adapter shapes-colour --unet shapes-refl --output demo/unet
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from texforce_hub import apply_adapter, load_pipeline
from texforce_hub.generate.draw import DrawSettings, generate_images
from texforce_hub.generate.images.sheet import contact_sheet

PROMPTS = ("a red circle", "a blue square")


def main(adapters: Sequence[str], unet: str, output: Path) -> Path:
    """Draw, and give the sheet that shows it."""
    settings = DrawSettings(tuple(PROMPTS), inference_steps=15, guidance=5.0)
    groups, columns = [], []
    for tuned in (None, unet):
        pipe = load_pipeline("shapes", unet=tuned)
        groups.append(generate_images(pipe, settings))
        with apply_adapter(pipe, list(adapters)):
            groups.append(generate_images(pipe, settings))
        columns += ["base", "text"] if tuned is None else ["U-Net", "both"]
    cells_by_row = [image for row in zip(*groups, strict=True) for image in row]
    output.mkdir(parents=True, exist_ok=True)
    sheet = output / "sheet.png"
    contact_sheet(cells_by_row, rows=PROMPTS, columns=columns).save(sheet)
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--unet", default="shapes-refl")
    parser.add_argument("--output", type=Path, default=Path("demo/03_finetuned_unet"))
    options = parser.parse_args()
    print(main(options.adapter or ["shapes-colour"], options.unet, options.output))
