"""``texforce-hub train``: reinforcement learning of a text-encoder LoRA."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from texforce_hub.cli import names
from texforce_hub.cli.console import put, put_json, say
from texforce_hub.cli.environments import prepare_rewards
from texforce_hub.cli.options import RESULT, WORK, AsJson, Device, Dtype, Yes, option
from texforce_hub.cli.table import put_table
from texforce_hub.errors import ConfigError, NotBetterError, TexForceHubError

if TYPE_CHECKING:
    from texforce_hub.train.training_run import StepReport


_WHAT, _HOW = "What is trained", "How it is trained"
_NO_SETTINGS = ("config", "preset", "dry_run", "yes", "as_json")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


def train(
    base: Annotated[
        str | None,
        option(
            "--base",
            metavar="BASE",
            help="shapes (default), shapes-turbo, a folder, a file, a Hub id.",
            group=_WHAT,
            autocompletion=names.bases,
        ),
    ] = None,
    unet: Annotated[
        str | None, option("--unet", metavar="REF", help="Another U-Net, to train the adapter for.", group=_WHAT)
    ] = None,
    init: Annotated[
        str | None,
        option(
            "--init",
            metavar="REF",
            help="An adapter to go on from, with any reward.",
            group=_WHAT,
            autocompletion=names.refs,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        option("--prompts", metavar="LIST", help="A prompt a line; or FILE.csv:COLUMN, hub:NAME …", group=_WHAT),
    ] = None,
    anchor_prompts: Annotated[
        str | None,
        option("--anchor-prompts", metavar="LIST", help="Prompts that are to stay as they are.", group=_WHAT),
    ] = None,
    allow_cut: Annotated[
        bool | None,
        option("--allow-cut/--no-allow-cut", help="Train on prompts that the text encoder cuts.", group=_WHAT),
    ] = None,
    reward: Annotated[
        list[str] | None,
        option(
            "--reward",
            metavar="NAME",
            help="NAME[=WEIGHT], python:module:function …; repeatable.",
            group=_WHAT,
            autocompletion=names.rewards,
        ),
    ] = None,
    watch: Annotated[
        list[str] | None,
        option(
            "--watch",
            metavar="NAME",
            help="Not trained on: notices when others are fooled.",
            group=_WHAT,
            autocompletion=names.rewards,
        ),
    ] = None,
    algorithm: Annotated[
        str | None, option("--algorithm", metavar="NAME", help="streaming (default), ppo, or direct.", group=_HOW)
    ] = None,
    steps: Annotated[
        int | None, option("--steps", metavar="N", help="Rollouts, each followed by its updates.", group=_HOW)
    ] = None,
    max_minutes: Annotated[
        float | None, option("--max-minutes", metavar="X", help="End after so long.", group=_HOW)
    ] = None,
    inference_steps: Annotated[
        int | None, option("--inference-steps", metavar="N", help="Denoising steps of a rollout.", group=_HOW)
    ] = None,
    guidance: Annotated[
        float | None,
        option("--guidance", metavar="X", help="Of rollouts; at most 1 for none, as turbo has.", group=_HOW),
    ] = None,
    uncond: Annotated[
        str | None, option("--uncond", metavar="HOW", help="Negative prompt: detach, base or full.", group=_HOW)
    ] = None,
    seed: Annotated[int | None, option("--seed", metavar="N", help="Of everything random.", group=_HOW)] = None,
    rank: Annotated[int | None, option("--rank", metavar="N", help="Of the LoRA.", group=_HOW)] = None,
    target: Annotated[
        str | None, option("--target", metavar="LAYERS", help="attention (default), mlp, or all.", group=_HOW)
    ] = None,
    learning_rate: Annotated[float | None, option("--learning-rate", metavar="X", help="Of AdamW.", group=_HOW)] = None,
    anchor: Annotated[
        float | None, option("--anchor", metavar="X", help="How strongly known prompts are held.", group=_HOW)
    ] = None,
    ema: Annotated[
        float | None, option("--ema", metavar="X", help="Decay of a running average of the LoRA.", group=_HOW)
    ] = None,
    config: Annotated[
        Path | None, option("--config", metavar="FILE", help="TOML with any of the settings; options win.", group=_HOW)
    ] = None,
    preset: Annotated[
        str | None, option("--preset", metavar="NAME", help="For a GPU's memory: 8gb, 24gb or 80gb.", group=WORK)
    ] = None,
    batch_size: Annotated[
        int | None,
        option("--batch-size", "--batch", metavar="N", help="In one U-Net call; 0: what memory holds.", group=WORK),
    ] = None,
    checkpointing: Annotated[
        bool | None,
        option("--checkpointing/--no-checkpointing", help="Less memory for more work.", group=WORK),
    ] = None,
    offload: Annotated[
        bool | None, option("--offload/--no-offload", help="Keep on the CPU what is not at work.", group=WORK)
    ] = None,
    decoder: Annotated[
        str | None, option("--decoder", metavar="REF", help="An AutoencoderTiny in the VAE's place.", group=WORK)
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    yes: Yes = False,
    output: Annotated[
        Path | None,
        option("--output", "-o", metavar="DIR", help="Of the run; a run found there goes on.", group=RESULT),
    ] = None,
    samples: Annotated[
        str | None, option("--samples", metavar="LIST", help="Prompts to draw on the run's sheets.", group=RESULT)
    ] = None,
    track: Annotated[
        list[str] | None,
        option("--track", metavar="NAME", help="tensorboard, wandb or trackio; repeatable.", group=RESULT),
    ] = None,
    dry_run: Annotated[
        bool, option("--dry-run", help="Only say what is trained on and what it costs.", group=RESULT)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a text-encoder LoRA with a reward (TexForce): adapter, metrics, pictures."""
    options = {name: value for name, value in locals().items() if name not in _NO_SETTINGS and value is not None}
    from texforce_hub.evaluate.processes import Share
    from texforce_hub.train.config import make_config

    sys.path.insert(0, "")  # python:module:function finds modules of the current folder
    follows = Share.from_environment().rank > 0  # a launcher started another process, which speaks for all
    with _silently() if follows else nullcontext():
        settings = _read_settings(config, preset, options)
        prepared = make_config({"output": "none", **settings} if dry_run else settings)
        prepare_rewards([*prepared.reward, *prepared.watch], yes=yes)
        if follows:
            _follow(prepared, dry_run=dry_run)
        elif dry_run:
            _estimate(prepared, as_json)
        else:
            _run(prepared, as_json)


def _read_settings(config: Path | None, preset: str | None, options: dict[str, Any]) -> dict[str, Any]:
    from texforce_hub.settings import read_settings, suggest_name
    from texforce_hub.train.config import PRESETS

    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; {suggest_name(preset, PRESETS, otherwise='there are')}")
    settings = (PRESETS[preset] if preset else {}) | (read_settings(config) if config else {})
    return settings | {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


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
    multiple = float(adapter.metadata.get("texforce_hub.multiple", 1))
    path = Path(config.output) / ADAPTER
    if as_json:
        facts = {"steps": config.steps, "weights_of_step": step, "multiple": multiple, "seed": config.seed}
        put_json({"adapter": str(path)} | facts)
    else:
        stretched = f", times {multiple:g}" if multiple != 1 else ""
        put(f"{path}: weights of step {step} of {max(step, config.steps)}{stretched}")


def _follow(config: Any, *, dry_run: bool) -> None:
    from texforce_hub.train.run import train_adapter

    if not dry_run:  # one process is enough to say what it would cost
        train_adapter(config)


@contextmanager
def _silently() -> Iterator[None]:
    """End as another process does, which says all there is to say but that it is lost."""
    import logging

    from texforce_hub.train.team import LostProcessError

    logging.getLogger("texforce_hub").setLevel(logging.CRITICAL)
    try:
        yield
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
