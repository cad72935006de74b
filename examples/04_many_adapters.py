"""One batch, many adapters: every prompt under its own stack, one U-Net call a step for all of them.

python examples/04_many_adapters.py --adapter shapes-colour --adapter shapes-shape --output demo/many
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from texforce_hub import encode_prompts, load_pipeline
from texforce_hub.generate.draw import DrawSettings, sample
from texforce_hub.generate.images.sheet import contact_sheet

PROMPTS = ("a red circle", "a blue square")


def main(adapters: Sequence[str], output: Path) -> Path:
    """Draw, and give the sheet that shows it."""
    pipe = load_pipeline("shapes")
    settings = DrawSettings(tuple(PROMPTS), inference_steps=15, guidance=5.0)
    stacks = [None, *adapters, list(adapters)]
    cells = [(prompt, stack) for prompt in PROMPTS for stack in stacks]
    calls: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    embeddings = encode_prompts(pipe, [prompt for prompt, _ in cells], [stack for _, stack in cells])
    images = sample(pipe, settings, [0] * len(cells), embeddings)
    handle.remove()
    print(f"{len(cells)} images under {len(stacks)} stacks: {len(calls)} U-Net calls")
    groups = [images[column :: len(stacks)] for column in range(len(stacks))]
    columns = ["base", *adapters, "all"]
    cells_by_row = [image for row in zip(*groups, strict=True) for image in row]
    output.mkdir(parents=True, exist_ok=True)
    sheet = output / "sheet.png"
    contact_sheet(cells_by_row, rows=PROMPTS, columns=columns).save(sheet)
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--output", type=Path, default=Path("demo/04_many_adapters"))
    options = parser.parse_args()
    print(main(options.adapter or ["shapes-colour", "shapes-shape"], options.output))
