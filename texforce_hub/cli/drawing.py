"""What ``apply`` does with its options: load, draw column by column, save, with bars and a sheet at the end."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import Progress

from texforce_hub.apply import Applied, apply_adapter
from texforce_hub.cli.console import put, put_json
from texforce_hub.conditioning import encode_prompts
from texforce_hub.errors import ConfigError, PromptError
from texforce_hub.files import writing
from texforce_hub.generate import generate_images, sample, save_images
from texforce_hub.images.sheet import contact_sheet
from texforce_hub.pipelines import load_pipeline, save_checkpoint, save_pipeline, save_text_encoder
from texforce_hub.replay import Run
from texforce_hub.schedulers import set_scheduler
from texforce_hub.stack import Entry, Item, read_stack, reweighted

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


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the sheet: its title, and the stack it is drawn under (none: the base)."""

    label: str
    entries: tuple[Entry, ...] = ()

    @property
    def items(self) -> list[Item] | None:
        """The stack as ``apply_adapter`` takes it."""
        return [entry.item for entry in self.entries] or None


def plan_columns(run: Run, entries: Sequence[Entry]) -> list[Column]:
    """The base, then the whole stack, or each adapter, or a sweep of one adapter's weight.

    Raises:
        ConfigError: both, one of them without a stack or fused, or a sweep of an adapter that is not there.
    """
    together = run.each or bool(run.sweep)
    if run.each and run.sweep:
        raise ConfigError("--each and --sweep both ask for columns; give one of them")
    if together and (not entries or run.mode != "attach"):
        raise ConfigError("--each and --sweep draw several stacks at once: give --adapter, and no other --mode")
    if run.each:
        return [Column("base"), *(Column(entry.label, (entry,)) for entry in entries)]
    if run.sweep:
        return [Column("base"), *_sweep_columns(run.sweep, entries)]
    whole = [Column(" + ".join(str(ref) for ref in run.adapters), tuple(entries))] if entries else []
    return [Column("base"), *whole]


def _sweep_columns(sweep: str, entries: Sequence[Entry]) -> Iterator[Column]:
    name, weights = sweep_weights(sweep)
    labels = [entry.label for entry in entries]
    if name not in labels:
        raise ConfigError(f"--sweep: no adapter {name!r} in the stack; it has {', '.join(labels)}")
    for weight in weights:
        yield Column(f"{name}={weight:g}", tuple(reweighted(entries, {name: weight})))


class Drawing:
    """One run of ``apply``, with its pipeline once it is loaded."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.entries = read_stack(list(run.adapters)) if run.adapters else []
        self.columns = plan_columns(run, self.entries)
        self.together = run.each or bool(run.sweep)
        self.pipe: Any = None
        if run.rounding not in ("nearest", "stochastic"):
            raise ConfigError(f"--rounding {run.rounding!r}; expected nearest or stochastic")

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
        jobs = len(settings.jobs())
        runs = [jobs * len(self.columns)] if self.together else [jobs] * len(self.columns)
        batches = sum(-(-images // settings.batch_size) for images in runs)
        with Progress(console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task("drawing", total=batches * settings.inference_steps)
            draw = self._draw_together if self.together else self._draw_in_turn
            groups = draw(lambda: bars.advance(task))
        paths: list[Path] = []
        for column, group in zip(self.columns, groups):
            paths += self._save_column(column, group, output)
        rows = [f"{prompt} · {seed}" for prompt, seed in settings.jobs()]
        cells = [image for row in zip(*groups) for image in row]
        sheet = contact_sheet(cells, rows=rows, columns=[column.label for column in self.columns])
        with writing(output / "sheet.png") as part:
            sheet.save(part, format="PNG")
        return [*paths, output / "sheet.png"]

    def save(self, places: Mapping[str, Path | None], *, portable: bool) -> list[Path]:
        """Bake the stack in, save what is asked for, take it off again."""
        if not any(places.values()):
            return []
        if not self.entries:
            return list(self._save_all(places, portable))
        with self._apply([entry.item for entry in self.entries], "fuse"):
            return list(self._save_all(places, portable))

    def _apply(self, items: list[Item], mode: str) -> Applied:
        rounding = self.run.rounding if mode == "fuse" else "nearest"
        how = {"mode": mode, "rounding": rounding, "seed": self.run.settings.seed}
        return apply_adapter(self.pipe, items, **cast(Any, how))

    def _save_all(self, places: Mapping[str, Path | None], portable: bool) -> Iterator[Path]:
        if (folder := places["pipeline"]) is not None:
            yield save_pipeline(self.pipe, folder, portable=portable)
        if (file := places["checkpoint"]) is not None:
            yield save_checkpoint(self.pipe, file)
        if (file := places["text_encoder"]) is not None:
            yield from save_text_encoder(self.pipe, file)

    def _draw_in_turn(self, on_step: Callable[[], None]) -> list[list[Any]]:
        return [self._draw_column(column.items, on_step) for column in self.columns]

    def _draw_column(self, items: list[Item] | None, on_step: Callable[[], None]) -> list[Any]:
        if items is None:
            return generate_images(self.pipe, self.run.settings, on_step=on_step)
        with self._apply(items, self.run.mode) as applied:
            for reason in dict.fromkeys(applied.dead_layers(self.run.settings.clip_skip or 0).values()):
                logger.warning("%s", reason)
            return generate_images(self.pipe, self.run.settings, on_step=on_step)

    def _draw_together(self, on_step: Callable[[], None]) -> list[list[Any]]:
        """All columns in the same batches: one U-Net call a step, whatever the number of stacks."""
        settings = self.run.settings
        cells = [(prompt, seed, column.items) for column in self.columns for prompt, seed in settings.jobs()]
        images: list[Any] = []
        extra = {"clip_skip": settings.clip_skip} if settings.clip_skip is not None else {}
        for start in range(0, len(cells), settings.batch_size):
            texts, seeds, stacks = zip(*cells[start : start + settings.batch_size])
            guided = settings.guidance > 1
            given = encode_prompts(self.pipe, texts, stacks, negative=settings.negative, guided=guided, **extra)
            images += sample(self.pipe, settings, list(seeds), given, on_step=on_step)
        size = len(settings.jobs())
        return [images[i * size : (i + 1) * size] for i in range(len(self.columns))]

    def _save_column(self, column: Column, images: list[Any], output: Path) -> list[Path]:
        named = re.sub(r"[^\w.=-]+", "_", column.label) if self.together else "stack"
        origin: dict[str, Any] = {"base": self.run.base, "unet": self.run.unet, "column": column.label}
        if column.entries:
            origin |= {"adapters": [self._written(entry) for entry in column.entries], "mode": self.run.mode}
        sampler = type(self.pipe.scheduler).__name__.removesuffix("Scheduler")
        folder = output / (named if column.entries else "base")
        return save_images(images, self.run.settings, folder, sampler=sampler, origin=origin)

    def _written(self, entry: Entry) -> str:
        """The reference that gives this entry, with the weight it has here."""
        position = [other.label for other in self.entries].index(entry.label)
        return str(replace(self.run.adapters[position], weight=entry.weight.weight, parts=entry.weight.parts))
