"""What ``apply`` does with its options: load, draw column by column, save, with bars and a sheet at the end."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console
from rich.progress import Progress

from texforce_hub.apply import apply_adapter
from texforce_hub.cli.console import put, put_json
from texforce_hub.conditioning import encode_prompts
from texforce_hub.errors import ConfigError, PromptError
from texforce_hub.files import writing
from texforce_hub.generate import generate_images, sample, save_images
from texforce_hub.images.sheet import contact_sheet
from texforce_hub.pipelines import load_pipeline, save_checkpoint, save_pipeline, save_text_encoder
from texforce_hub.replay import Run
from texforce_hub.schedulers import set_scheduler
from texforce_hub.stack import Item, read_stack

logger = logging.getLogger("texforce_hub")

_SWEEP = re.compile(r"(?P<name>[\w-]+)=(?P<start>[^:]+):(?P<stop>[^:]+):(?P<count>\d+)")


def read_prompts(given: Sequence[str], file: Path | None, *, needed: bool = True) -> tuple[str, ...]:
    """The prompts of the command line and of a file, one a line, ``#`` beginning a comment.

    Raises:
        PromptError: there is none though one is needed, or the file cannot be read.
    """
    lines: list[str] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"prompts file {file}: {error}") from error
    found = (*given, *(line.strip() for line in lines if line.strip() and not line.startswith("#")))
    if not found and needed:
        raise PromptError("no prompt; give --prompt TEXT or --prompts FILE")
    return found or ("nothing",)


def sweep_weights(text: str) -> tuple[str, list[float]]:
    """``NAME=0:1:5`` → the adapter's label and evenly spaced weights, ends included.

    Raises:
        ConfigError: anything else.
    """
    found = _SWEEP.fullmatch(text)
    try:
        if found is not None and int(found["count"]) > 1:
            start, stop, count = float(found["start"]), float(found["stop"]), int(found["count"])
            return found["name"], [start + (stop - start) * i / (count - 1) for i in range(count)]
    except ValueError:
        pass
    raise ConfigError(f"--sweep {text!r}; expected NAME=FROM:TO:COUNT with COUNT of at least 2, e.g. style=0:1:5")


def print_files(files: Sequence[Path], *, as_json: bool) -> None:
    """The files written, one a line, or as JSON."""
    if as_json:
        put_json({"files": [str(path) for path in files]})
    else:
        for path in files:
            put(str(path))


class Drawing:
    """One run of ``apply``, with its pipeline once it is loaded."""

    def __init__(self, run: Run, *, each: bool, sweep: str | None) -> None:
        self.run = run
        self.entries = read_stack(list(run.adapters)) if run.adapters else []
        self.columns = self._columns(each, sweep)
        self.together = each or sweep is not None
        self.pipe: Any = None

    def load(self, *, device: str | None, dtype: str | None, offload: bool) -> None:
        """Load the base and its partner."""
        place = "cpu" if offload else device
        self.pipe = load_pipeline(self.run.base, unet=self.run.unet or None, device=place, dtype=dtype)
        if self.run.scheduler:
            set_scheduler(self.pipe, self.run.scheduler)
        if offload:
            try:
                self.pipe.enable_model_cpu_offload()
            except (RuntimeError, ValueError) as error:
                raise ConfigError(f"--offload needs a GPU: {(str(error).splitlines() or ['none here'])[0]}") from error

    def draw(self, output: Path) -> list[Path]:
        """Write the images of every column and the sheet, whose path comes last."""
        settings = self.run.settings
        batches = -(-len(settings.jobs()) // settings.batch_size)
        total = len(self.columns) * len(settings.jobs()) if self.together else len(self.columns) * batches
        with Progress(console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task("drawing", total=total * (1 if self.together else settings.inference_steps))
            pictures = self._draw_together(lambda n: bars.advance(task, n)) if self.together else None
            groups = pictures or [self._draw_column(items, lambda: bars.advance(task)) for _, items in self.columns]
        paths: list[Path] = []
        for (label, items), group in zip(self.columns, groups):
            paths += self._save_column(label, items, group, output)
        rows = [f"{prompt} · {seed}" for prompt, seed in settings.jobs()]
        cells = [image for row in zip(*groups) for image in row]
        sheet = contact_sheet(cells, rows=rows, columns=[label for label, _ in self.columns])
        with writing(output / "sheet.png") as part:
            sheet.save(part, format="PNG")
        return [*paths, output / "sheet.png"]

    def save(self, places: Mapping[str, Path | None], *, portable: bool) -> list[Path]:
        """Bake the stack in, save what is asked for, take it off again."""
        if not any(places.values()):
            return []
        if not self.entries:
            return list(self._save_all(places, portable))
        with apply_adapter(self.pipe, [entry.item for entry in self.entries], mode="fuse"):
            return list(self._save_all(places, portable))

    def _save_all(self, places: Mapping[str, Path | None], portable: bool) -> Iterator[Path]:
        if (folder := places["pipeline"]) is not None:
            yield save_pipeline(self.pipe, folder, portable=portable)
        if (file := places["checkpoint"]) is not None:
            yield save_checkpoint(self.pipe, file)
        if (file := places["text_encoder"]) is not None:
            yield from save_text_encoder(self.pipe, file)

    def _columns(self, each: bool, sweep: str | None) -> list[tuple[str, list[Item] | None]]:
        columns: list[tuple[str, list[Item] | None]] = [("base", None)]
        if not self.entries:
            return columns
        if sweep is not None:
            name, weights = sweep_weights(sweep)
            if name not in {entry.label for entry in self.entries}:
                labels = ", ".join(entry.label for entry in self.entries)
                raise ConfigError(f"--sweep: no adapter {name!r} in the stack; it has {labels}")
            for weight in weights:
                entries = [e.reweighted(weight) if e.label == name else e for e in self.entries]
                columns.append((f"{name}={weight:g}", [entry.item for entry in entries]))
        elif each:
            columns += [(entry.label, [entry.item]) for entry in self.entries]
        else:
            columns.append((" + ".join(str(ref) for ref in self.run.adapters), [e.item for e in self.entries]))
        return columns

    def _draw_column(self, items: list[Item] | None, on_step: Any) -> list[Any]:
        if items is None:
            return generate_images(self.pipe, self.run.settings, on_step=on_step)
        mode = cast(Literal["attach", "fuse"], self.run.mode)
        with apply_adapter(self.pipe, items, mode=mode) as applied:
            for reason in dict.fromkeys(applied.dead_layers(self.run.settings.clip_skip or 0).values()):
                logger.warning("%s", reason)
            return generate_images(self.pipe, self.run.settings, on_step=on_step)

    def _draw_together(self, advance: Any) -> list[list[Any]]:
        """All columns in the same batches: one U-Net call a step, whatever the number of stacks."""
        settings = self.run.settings
        cells = [(prompt, seed, items) for _, items in self.columns for prompt, seed in settings.jobs()]
        images: list[Any] = []
        extra = {"clip_skip": settings.clip_skip} if settings.clip_skip is not None else {}
        for start in range(0, len(cells), settings.batch_size):
            batch = cells[start : start + settings.batch_size]
            texts, seeds, stacks = zip(*batch)
            guided = settings.guidance > 1
            given = encode_prompts(self.pipe, texts, stacks, negative=settings.negative, guided=guided, **extra)
            images += sample(self.pipe, settings, list(seeds), given)
            advance(len(batch))
        size = len(settings.jobs())
        return [images[i * size : (i + 1) * size] for i in range(len(self.columns))]

    def _save_column(self, label: str, items: list[Item] | None, images: list[Any], output: Path) -> list[Path]:
        named = "base" if items is None else re.sub(r"[^\w.=-]+", "_", label) if self.together else "stack"
        origin: dict[str, Any] = {"base": self.run.base, "unet": self.run.unet, "column": label}
        if items is not None:
            origin |= {"adapters": [str(ref) for ref in self.run.adapters], "mode": self.run.mode}
        sampler = type(self.pipe.scheduler).__name__.removesuffix("Scheduler")
        return save_images(images, self.run.settings, output / named, sampler=sampler, origin=origin)
