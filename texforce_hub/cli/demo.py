"""``texforce-hub demo``: the whole story on the embedded pipeline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli.console import put, put_json
from texforce_hub.cli.table import put_table

if TYPE_CHECKING:
    from texforce_hub.demo import Demonstration


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    output: Annotated[Path, typer.Option(help="Folder for table, pictures and training run.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Take the shipped adapter instead of training one.")] = False,
    seed: Annotated[int, typer.Option(help="Of the training run.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; by default a GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of the table.")] = False,
) -> None:
    """Train a text-encoder LoRA on the embedded pipeline, combine it with a tuned U-Net, and show that both help.

    Minutes on two CPU cores, seconds on a GPU. All figures are computed anew, also with --quick.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from texforce_hub.demo import PROMPTS, ROWS, SEEDS, run_demo

    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        training = None if quick else bar.add_task("training", total=None)
        measuring = bar.add_task("measuring", total=(len(ROWS) + 2) * PROMPTS * len(SEEDS))

        def show_step(report: Any) -> None:
            bar.update(training, total=report.steps, completed=report.step)  # type: ignore[arg-type]
            bar.update(training, description=f"training, reward {report.reward:.3f}")  # type: ignore[arg-type]

        result = run_demo(
            output,
            quick=quick,
            seed=seed,
            device=device,
            on_step=show_step,
            on_images=lambda name, count: bar.update(measuring, advance=count, description=f"measuring, {name}"),
        )
    if as_json:
        put_json(result.results)
    else:
        _print(result, quick=quick)


def _print(result: "Demonstration", *, quick: bool) -> None:
    measured = result.evaluation
    names = {"base": "base", "text": "text-encoder LoRA", "unet": "fine-tuned U-Net", "both": "both"}
    rows = []
    for row, name in names.items():
        against = "" if row == "base" else str(measured.difference(row, "base"))
        rows.append([name, f"{measured.mean(row).mean:.3f}", against])
    count = f"{len(measured.prompts)} prompts × {len(measured.sampling.seeds)} images"
    put_table(["held-out prompts, misunderstood words", "reward", "minus base [95 % interval]"], rows, title=count)
    for other in ("text", "unet"):
        put(f"both minus {names[other]}: {measured.difference('both', other)}")
    known = result.canonical
    put(f"words the base knew: {known.mean('base').mean:.3f}, with the LoRA {known.difference('text', 'base')}")
    files = ["sheet.png", "results.json"] + ([] if quick else ["train/reward.png"])
    put("pictures and figures: " + ", ".join(str(result.folder / name) for name in files))
