"""``texforce-hub demo``: the whole story on the embedded pipeline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from texforce_hub.cli.console import put, put_detail, put_json
from texforce_hub.cli.options import RESULT, WORK, AsJson, Device, option
from texforce_hub.cli.progress import bars
from texforce_hub.cli.table import put_table

if TYPE_CHECKING:
    from texforce_hub.demo import Demonstration
    from texforce_hub.train.training_run import StepReport


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    output: Annotated[
        Path, option("--output", "-o", metavar="DIR", help="For table, pictures and training run: demo.", group=RESULT)
    ] = Path("demo"),
    train: Annotated[
        bool, option("--train", help="Train the adapter first: minutes on a GPU, longer on a CPU.", group=WORK)
    ] = False,
    seed: Annotated[int, option("--seed", metavar="N", min=0, help="Of the training run.", group=WORK)] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Combine a text-encoder LoRA with a tuned U-Net on the embedded pipeline, and show that both help.

    All figures are computed anew, a minute on two CPU cores. With --train the adapter is trained before.
    """
    from texforce_hub.demo import PROMPTS, ROWS, SEEDS, SHORT_PROMPTS, run_demo
    from texforce_hub.train.config import TrainConfig

    prompts = PROMPTS if train else SHORT_PROMPTS
    totals = {"training": TrainConfig(output="unused").steps} if train else {}
    with bars({**totals, "measuring": (len(ROWS) + 2) * prompts * len(SEEDS)}) as advance:

        def show_step(_report: "StepReport") -> None:
            advance("training", 1)

        result = run_demo(
            output,
            train=train,
            prompts=prompts,
            seed=seed,
            device=device,
            on_step=show_step,
            on_images=lambda _name, count: advance("measuring", count),
        )
    if as_json:
        put_json(result.results)
    else:
        _print(result, trained=train)


def _print(result: "Demonstration", *, trained: bool) -> None:
    measured = result.evaluation
    names = {"base": "base", "text": "text-encoder LoRA", "unet": "fine-tuned U-Net", "both": "both"}
    rows = []
    for row, name in names.items():
        against = "" if row == "base" else str(measured.difference(row, "base"))
        rows.append([name, f"{measured.mean(row).mean:.3f}", against])
    count = f"{len(measured.prompts)} held-out prompts with misunderstood words × {len(measured.sampling.seeds)} images"
    put_table(["drawn with", "reward", "minus base [95 % interval]"], rows, title=count)
    for other in ("text", "unet"):
        put_detail(f"both minus {names[other]}: {measured.difference('both', other)}")
    known = result.canonical
    put_detail(f"words the base knew: {known.mean('base').mean:.3f}, with the LoRA {known.difference('text', 'base')}")
    files = ["sheet.png", "results.json"] + (["train/reward.png"] if trained else [])
    put("pictures and figures: " + ", ".join(str(result.folder / name) for name in files))
