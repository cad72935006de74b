"""What reward hacking looks like: a text encoder trained on brightness alone, with and without what holds it.

``python -m benchmarks.hacking`` trains twice, a minute each, with ``alignment`` watched; it prints both rewards on
held-out prompts and draws the picture of docs/training.md. The runs stay under ``--output``.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.timing import head, row
from texforce_hub.demo import PROMPT_SEED
from texforce_hub.evaluate.drawing import Easel, Variant
from texforce_hub.evaluate.evaluation import Sampling
from texforce_hub.files.checkpoint import read_checkpoint
from texforce_hub.generate.images.figure import new_figure, render
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.shapes import GUIDANCE, INFERENCE_STEPS
from texforce_hub.shapes.grammar import sample_prompts
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.run import train_adapter

PICTURE = Path(__file__).parents[1] / "docs" / "hacking.png"
RUNS: dict[str, dict[str, Any]] = {"nothing holds it": {"anchor": 0.0}, "held by the anchor": {"anchor": 20.0}}
COLOURS = dict(zip(RUNS, ("tab:red", "tab:blue"), strict=True))
REHEARSAL: dict[str, Any] = {"steps": 1, "inference_steps": 4, "validation_prompts": 4}
SHOWN = 6  # prompts in the picture
Points = list[tuple[int, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both, print what became of the two rewards, and draw it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hacking", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("hacking"), help="folder of the runs")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: one step, four prompts to validate on")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    given = parser.parse_args(arguments)
    length = REHEARSAL if given.quick else {"steps": 40}
    logging.basicConfig(format="%(message)s")  # the alarm
    curves, variants = dict[str, tuple[Points, Points]](), {"base": Variant()}
    for name, settings in RUNS.items():
        print(f"{name}:", flush=True)
        config = TrainConfig(
            str(given.output / name.replace(" ", "-")), prompts="shapes:canonical", reward=("brightness",),
            watch=("alignment",), algorithm="direct", learning_rate=8e-3, decay="constant",
            validate_every=5, keep="last", stretch=1.0, sheet_every=0, device="cpu", **length, **settings,
        )  # fmt: skip
        variants[f"{name}, step {config.steps}"] = Variant(train_adapter(config))
        state = read_checkpoint(Path(config.output))
        assert state is not None
        curves[name] = state.facts["validations"], state.facts["watched"]
    head("held out", *(f"step {step}" for step, _ in curves[name][0]))
    for name, pair in curves.items():
        for reward, points in zip(("brightness", "alignment, watched"), pair, strict=True):
            row(f"{name}: {reward}", *(f"{value:.3f}" for _, value in points))
    draw(curves, pictures(variants), given.picture)


def pictures(variants: Mapping[str, Variant]) -> dict[str, list[Tensor]]:
    """Test prompts in known words, by every variant from the same noise; each picture ``(3, h, w)``."""
    prompts = sample_prompts(SHOWN, PROMPT_SEED, split="test")
    easel = Easel(load_pipeline("shapes", device="cpu"), variants, Sampling((0,), INFERENCE_STEPS, GUIDANCE))
    drawn = dict[tuple[str, int], Tensor]()
    for jobs, images in easel.draw(easel.plan(dict(enumerate(prompts)))):
        drawn |= {(job.variant, job.index): image for job, image in zip(jobs, images, strict=True)}
    return {name: [drawn[easel.same[name], index] for index in range(SHOWN)] for name in variants}


def draw(curves: Mapping[str, tuple[Points, Points]], rows: Mapping[str, list[Tensor]], path: Path) -> None:
    """Both rewards by step, and under them a row of pictures for every variant."""
    figure = new_figure(8, 6.5)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[1, 1.15])[:, 0]
    for axes, title, which in zip(
        above.subplots(1, 2), ("brightness: what is trained on", "alignment: only watched"), (0, 1), strict=True
    ):
        for name, pair in curves.items():
            axes.plot(*zip(*pair[which], strict=True), "o-", color=COLOURS[name], markersize=3, label=name)
        axes.set(title=title, xlabel="step", ylim=(0, 1))
        axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    cells = below.subplots(len(rows), SHOWN)
    for line, (name, images) in zip(cells, rows.items(), strict=True):
        for cell, image in zip(line, images, strict=True):
            cell.imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().numpy())
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(name.replace(", ", ",\n"), fontsize=8, rotation=0, ha="right", va="center")
    render(figure).quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()
