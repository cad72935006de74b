"""``texforce-hub train``: reinforcement learning of a text-encoder LoRA."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from texforce_hub.cli.console import put, put_json, say

if TYPE_CHECKING:
    from texforce_hub.train.run import StepReport


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


def train(
    output: Annotated[Path | None, typer.Option(help="Folder of the run; a run found there goes on.")] = None,
    base: Annotated[str | None, typer.Option(help="shapes (default), a folder, a single file, or a Hub id.")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME=WEIGHT, repeatable: a built-in such as alignment, or python:module:function."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="File, one prompt a line; for shapes also shapes:colour, shapes:shape.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Rollouts, each followed by its updates.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings; options win.")] = None,
    uncond: Annotated[
        str | None, typer.Option(help="How the negative prompt is encoded in training: detach, base or full.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the LoRA.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    kl: Annotated[float | None, typer.Option(help="Weight of the divergence from the base.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of a running average of the LoRA.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "--batch", help="Pictures in one U-Net call; lower it if memory runs out."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; by default a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the frozen weights: float32, float16 or bfloat16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a text-encoder LoRA with a reward (TexForce); writes the adapter, checkpoints, metrics and pictures."""
    options = {name: value for name, value in locals().items() if name not in ("config", "as_json")}
    from texforce_hub.settings import read_settings
    from texforce_hub.train.config import make_config

    settings = read_settings(config) if config else {}
    settings |= {k: str(v) if isinstance(v, Path) else v for k, v in options.items() if v is not None}
    _run(make_config(settings), as_json)


def _run(config: Any, as_json: bool) -> None:
    from texforce_hub.train.run import train_adapter
    from texforce_hub.train.run_folder import ADAPTER

    sys.path.insert(0, "")  # python:module:function finds modules of the current folder
    with _progress(config.steps) as show, _terminable():
        try:
            adapter = train_adapter(config, on_step=show)
        except KeyboardInterrupt:
            say(_how_to_resume(config))
            raise typer.Exit(130) from None
    step = int(adapter.metadata["texforce_hub.steps"])
    path = Path(config.output) / ADAPTER
    if as_json:
        put_json({"adapter": str(path), "steps": config.steps, "weights_of_step": step, "seed": config.seed})
    else:
        put(f"{path}: weights of step {step} of {config.steps}")


def _how_to_resume(config: Any) -> str:
    from texforce_hub.files.checkpoint import list_checkpoints

    saved = list_checkpoints(Path(config.output))
    if not saved:
        return "interrupted before the first step; nothing to save"
    step = saved[-1].name.removeprefix("checkpoint-")
    return f"saved at step {step}; resume with: texforce-hub train --config {Path(config.output) / 'config.toml'}"


@contextmanager
def _progress(steps: int) -> Iterator[Any]:
    """A bar on stderr, and the library's messages above it."""
    import logging

    console = Console(stderr=True)
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False, markup=False)
    logger = logging.getLogger("texforce_hub")
    columns = [
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[reward]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    ]  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=steps, reward="")
        logger.addHandler(handler)
        logger.propagate = False
        try:
            yield lambda report: bar.update(task, completed=report.step, reward=_describe(report))
        finally:
            logger.removeHandler(handler)
            logger.propagate = True


def _describe(report: "StepReport") -> str:
    validation = "" if report.validation is None else f", validation {report.validation:.3f}"
    return f"reward {report.reward:.3f}{validation}"


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM as Ctrl-C: the run saves itself."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
