"""What the image commands share: prompts from options, bars while drawing, the sheet at the end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console
from rich.progress import Progress

from texforce_hub.apply import apply_adapter
from texforce_hub.errors import PromptError
from texforce_hub.files import writing
from texforce_hub.generate import Settings, generate_images, save_images
from texforce_hub.images.sheet import contact_sheet


def read_prompts(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The prompts of the command line and of a file, one a line, ``#`` beginning a comment.

    Raises:
        PromptError: there is none, or the file cannot be read.
    """
    lines: list[str] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"prompts file {file}: {error}") from error
    found = (*given, *(line.strip() for line in lines if line.strip() and not line.startswith("#")))
    if not found:
        raise PromptError("no prompt; give --prompt TEXT or --prompts FILE")
    return found


def draw(
    pipe: Any, adapters: Sequence[str], settings: Settings, output: Path, *, mode: str, origin: dict[str, Any]
) -> list[Path]:
    """Draw without and with the stack, write the images and the sheet; the sheet's path comes last."""
    output.mkdir(parents=True, exist_ok=True)
    before = _with_bar("base", pipe, settings)
    columns, groups = ["base"], [before]
    sampler = type(pipe.scheduler).__name__.removesuffix("Scheduler")
    paths = _save(before, "base" if adapters else "images", settings, output, sampler, origin)
    if adapters:
        with apply_adapter(pipe, list(adapters), mode=cast(Literal["attach", "fuse"], mode)):
            after = _with_bar("with the stack", pipe, settings)
        columns, groups = ["base", " + ".join(adapters)], [before, after]
        paths += _save(after, "stack", settings, output, sampler, {**origin, "adapters": list(adapters)})
    rows = [f"{prompt} · {seed}" for prompt, seed in settings.jobs()]
    sheet = contact_sheet([image for row in zip(*groups) for image in row], rows=rows, columns=columns)
    path = output / "sheet.png"
    with writing(path) as temporary:
        sheet.save(temporary, format="PNG")
    return [*paths, path]


def _save(
    images: Sequence[Any], name: str, settings: Settings, output: Path, sampler: str, origin: dict[str, Any]
) -> list[Path]:
    folder = output / name
    folder.mkdir(exist_ok=True)
    return save_images(images, settings, folder, sampler=sampler, origin=origin)


def _with_bar(title: str, pipe: Any, settings: Settings) -> list[Any]:
    batches = -(-len(settings.jobs()) // settings.batch_size)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=batches * settings.inference_steps)
        return generate_images(pipe, settings, on_step=lambda: bars.advance(task))
