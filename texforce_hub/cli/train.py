"""``texforce-hub train``: reinforcement learning of a text-encoder LoRA."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from texforce_hub.cli.console import put, put_json, say
from texforce_hub.cli.environments import prepare_rewards
from texforce_hub.cli.table import put_table
from texforce_hub.errors import ConfigError, NotBetterError, TexForceHubError

if TYPE_CHECKING:
    from texforce_hub.train.training_run import StepReport


_NO_SETTINGS = ("config", "preset", "dry_run", "yes", "as_json")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


def train(
    output: Annotated[Path | None, typer.Option(help="Folder of the run; a run found there goes on.")] = None,
    base: Annotated[
        str | None, typer.Option(help="shapes (default), shapes-turbo, a folder, a file, a Hub id.")
    ] = None,
    unet: Annotated[str | None, typer.Option(help="Another U-Net for it, to train the adapter for that one.")] = None,
    init: Annotated[str | None, typer.Option(help="An adapter to go on from, with any reward and prompts.")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME=WEIGHT, repeatable: a built-in such as alignment, or python:module:function."),
    ] = None,
    watch: Annotated[
        list[str] | None, typer.Option(help="A reward that is not trained on, to notice when the others are fooled.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="A prompt a line; FILE.csv:COLUMN, hub:NAME, a .toml of templates, shapes:colour."),
    ] = None,
    anchor_prompts: Annotated[str | None, typer.Option(help="File of prompts that are to stay as they are.")] = None,
    samples: Annotated[str | None, typer.Option(help="File of prompts to draw on the run's sheets.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="streaming (default), ppo, or direct.")] = None,
    steps: Annotated[int | None, typer.Option(help="Rollouts, each followed by its updates.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="End after so long.")] = None,
    inference_steps: Annotated[int | None, typer.Option(help="Denoising steps of a rollout.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Of the rollouts; at most 1 for none, as turbo has.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings; options win.")] = None,
    preset: Annotated[str | None, typer.Option(help="Settings for a GPU's memory: 8gb, 24gb or 80gb.")] = None,
    uncond: Annotated[
        str | None, typer.Option(help="How the negative prompt is encoded in training: detach, base or full.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the LoRA.")] = None,
    target: Annotated[str | None, typer.Option(help="Layers that carry it: attention (default), mlp, or all.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    anchor: Annotated[float | None, typer.Option(help="How strongly known prompts are held where they are.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of a running average of the LoRA.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "--batch", help="Pictures in one U-Net call; 0: as many as memory holds."),
    ] = None,
    checkpointing: Annotated[bool | None, typer.Option(help="Less memory for more work.")] = None,
    offload: Annotated[
        bool | None, typer.Option(help="Keep on the CPU what is not at work: decoder, text encoders, learned rewards.")
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(help="A small decoder (AutoencoderTiny) in the VAE's place: a folder, or a Hub id.")
    ] = None,
    allow_cut: Annotated[bool | None, typer.Option(help="Train on prompts that the text encoder cuts.")] = None,
    track: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb or trackio; repeatable.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; by default a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the frozen weights: float32, float16 or bfloat16.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is trained on and what it costs.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Install what a reward env:… needs, without a question.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a text-encoder LoRA with a reward (TexForce); writes the adapter, checkpoints, metrics and pictures."""
    options = {name: value for name, value in locals().items() if name not in _NO_SETTINGS and value is not None}
    from texforce_hub.settings import read_settings, suggest_name
    from texforce_hub.train.config import PRESETS, make_config

    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; {suggest_name(preset, PRESETS, otherwise='there are')}")
    settings = PRESETS[preset] if preset else {}
    settings = settings | (read_settings(config) if config else {})
    settings |= {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    if dry_run:
        _estimate(make_config({"output": "none", **settings}), as_json)
    else:
        prepared = make_config(settings)
        prepare_rewards([*prepared.reward, *prepared.watch], yes=yes)
        _run(prepared, as_json)


def _estimate(config: Any, as_json: bool) -> None:
    from texforce_hub.train.estimate import estimate

    cost = estimate(config)
    if as_json:
        put_json(cost.as_dict())
        return
    rows = [
        [str(s.timestep), f"{s.sensitivity:.2f}", f"{s.share:.1%}", "yes" if s.graded else "no"] for s in cost.steps
    ]
    put_table(["timestep", "sensitivity w", "share of w²", "trained on"], rows, title="denoising steps of a rollout")
    for line in cost.lines():
        put(line)


def _run(config: Any, as_json: bool) -> None:
    from texforce_hub.train.run import train_adapter
    from texforce_hub.train.run_folder import ADAPTER
    from texforce_hub.train.team import follows

    sys.path.insert(0, "")  # python:module:function finds modules of the current folder
    if follows():
        _follow(config)
        return
    with _progress(config.steps) as show:
        try:
            adapter = train_adapter(config, on_step=show)
        except KeyboardInterrupt:
            say(_how_to_resume(config))
            raise typer.Exit(130) from None
        except NotBetterError as error:
            say(str(error))
            raise typer.Exit(1) from None
    step = int(adapter.metadata["texforce_hub.steps"])
    path = Path(config.output) / ADAPTER
    if as_json:
        put_json({"adapter": str(path), "steps": config.steps, "weights_of_step": step, "seed": config.seed})
    else:
        put(f"{path}: weights of step {step} of {config.steps}")


def _follow(config: Any) -> None:
    """Train behind another process, which says all there is to say but that it is lost."""
    import logging

    from texforce_hub.train.run import train_adapter
    from texforce_hub.train.team import LostProcessError

    logging.getLogger("texforce_hub").setLevel(logging.CRITICAL)
    try:
        train_adapter(config)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except LostProcessError:
        raise
    except TexForceHubError as error:
        raise typer.Exit(1 if isinstance(error, NotBetterError) else 2) from None


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
