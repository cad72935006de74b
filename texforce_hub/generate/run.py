"""What ``apply`` does with its options: load, draw column by column, save, with bars and a sheet at the end."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import Progress

from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import Applied, apply_adapter
from texforce_hub.errors import ConfigError, PromptError
from texforce_hub.files.hashing import hash_files
from texforce_hub.files.writing import writing
from texforce_hub.generate.columns import Column, plan_columns
from texforce_hub.generate.draw import Cell, generate_cells, generate_images, save_images
from texforce_hub.generate.images.sheet import contact_sheet
from texforce_hub.generate.prompts.tags import TaggedPrompt
from texforce_hub.generate.recipe import DrawRun
from texforce_hub.generate.schedulers import set_scheduler
from texforce_hub.hub.find import find_bundle
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.stack import StackEntry, read_stack
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.pipelines.save import save_pipeline
from texforce_hub.pipelines.save_checkpoint import save_checkpoint, save_text_encoder


@contextmanager
def saying_once() -> Iterator[None]:
    """Each line of the library's log once, though it concerns every column of a picture."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        before = len(said)
        said.add(record.getMessage())
        return len(said) > before

    logger = logging.getLogger("texforce_hub")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


logger = logging.getLogger("texforce_hub")


class Drawing:
    """One run of ``apply``, with its pipeline once it is loaded."""

    def __init__(self, run: DrawRun) -> None:
        self.run = run
        read = _reading_once()
        self.entries = _read_entries(run.adapters, read)
        self.columns = plan_columns(run, self.entries)
        self.texts = [TaggedPrompt.parse(prompt).text for prompt in run.settings.prompts]
        if not all(self.texts):
            raise PromptError(f"{run.settings.prompts[self.texts.index('')]!r} holds tags alone; expected a word too")
        self.tags = [_read_entries(refs, read) for refs in run.tags] or [[] for _ in self.texts]
        self.together = run.each or bool(run.sweep) or (bool(run.tags) and run.mode == "attach")
        self.together &= all(_is_text_only(entry) for entry in (*self.entries, *(e for t in self.tags for e in t)))
        self.pipe: Any = None
        if run.rounding not in ("nearest", "stochastic"):
            raise ConfigError(f"--rounding {run.rounding!r}; expected nearest or stochastic")

    def load(self, *, device: str | None, dtype: str | None, offload: bool) -> None:
        """Load the base with its tuned U-Net."""
        target = "cpu" if offload else device
        self.pipe = load_pipeline(self.run.base, unet=self.run.unet or None, device=target, dtype=dtype)
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
        images = len(settings.jobs()) * len(self.columns)
        with Progress(console=Console(stderr=True), transient=True) as bars, saying_once():
            task = bars.add_task("drawing", total=images * settings.inference_steps)
            draw = self._draw_together if self.together else self._draw_in_turn
            groups = draw(lambda count: bars.advance(task, count))
        paths: list[Path] = []
        for column, group in zip(self.columns, groups):
            paths += self._save_column(column, group, output)
        rows = [f"{prompt} · {seed}" for prompt, seed in settings.jobs()]
        cells = [image for row in zip(*groups) for image in row]
        sheet = contact_sheet(cells, rows=rows, columns=[column.label for column in self.columns])
        with writing(output / "sheet.png") as part:
            sheet.save(part, format="PNG")
        return [*paths, output / "sheet.png"]

    def save(self, targets: Mapping[str, Path | None], *, portable: bool) -> list[Path]:
        """Bake the stack in, save what is asked for, take it off again."""
        if not any(targets.values()):
            return []
        if not self.entries:
            return list(self._save_all(targets, portable=portable))
        with self._apply(self.entries, "fuse"):
            return list(self._save_all(targets, portable=portable))

    def _apply(self, entries: Sequence[StackEntry], mode: str) -> Applied:
        rounding = self.run.rounding if mode == "fuse" else "nearest"
        how = {"mode": mode, "rounding": rounding, "seed": self.run.settings.seed}
        return apply_adapter(self.pipe, [entry.item for entry in entries], **cast(Any, how))

    def _save_all(self, targets: Mapping[str, Path | None], *, portable: bool) -> Iterator[Path]:
        if (folder := targets["pipeline"]) is not None:
            yield save_pipeline(self.pipe, folder, portable=portable)
        if (file := targets["checkpoint"]) is not None:
            yield save_checkpoint(self.pipe, file)
        if (file := targets["text_encoder"]) is not None:
            yield from save_text_encoder(self.pipe, file)

    def _stack(self, column: Column, number: int) -> list[StackEntry]:
        """What acts on one prompt in one column: the column's stack, then the prompt's own."""
        return [*column.entries, *(self.tags[number] if column.tagged else [])]

    def _draw_in_turn(self, on_step: Callable[[int], None]) -> list[list[Any]]:
        """Column by column; in each, the prompts under one stack after those under another."""
        groups = []
        for column in self.columns:
            images: dict[int, list[Any]] = {}
            numbers = range(len(self.texts))
            for members in _alike(numbers, key=lambda number: self._stack(column, number)):
                drawn = self._draw_under(self._stack(column, members[0]), members, on_step)
                size = self.run.settings.num_images
                images |= {number: drawn[i * size : (i + 1) * size] for i, number in enumerate(members)}
            groups.append([image for number in numbers for image in images[number]])
        return groups

    def _draw_under(
        self, stack: Sequence[StackEntry], members: Sequence[int], on_step: Callable[[int], None]
    ) -> list[Any]:
        settings = replace(self.run.settings, prompts=tuple(self.texts[number] for number in members))
        if not stack:
            return generate_images(self.pipe, settings, on_step=on_step)
        with self._apply(stack, self.run.mode) as applied:
            self._say_dead(applied)
            return generate_images(self.pipe, settings, on_step=on_step)

    def _say_dead(self, applied: Applied) -> None:
        for reason in dict.fromkeys(applied.dead_layers(self.run.settings.clip_skip or 0).values()):
            logger.warning("%s", reason)

    def _draw_together(self, on_step: Callable[[int], None]) -> list[list[Any]]:
        """All columns in the same batches: one U-Net call a step, whatever the number of stacks."""
        settings = self.run.settings
        stacks = [self._stack(column, number) for column in self.columns for number in range(len(self.texts))]
        for entry in {id(entry): entry for stack in stacks for entry in stack}.values():
            with self._apply([entry], "attach") as applied:
                self._say_dead(applied)
        cells: list[Cell] = []
        for column in self.columns:
            for number, text in enumerate(self.texts):
                stack = [entry.item for entry in self._stack(column, number)] or None
                cells += [(text, settings.seed + i, stack) for i in range(settings.num_images)]
        images = generate_cells(self.pipe, settings, cells, on_step=on_step)
        size = len(settings.jobs())
        return [images[i * size : (i + 1) * size] for i in range(len(self.columns))]

    def _save_column(self, column: Column, images: list[Any], output: Path) -> list[Path]:
        many = self.run.each or bool(self.run.sweep)
        named = re.sub(r"[^\w.=-]+", "_", column.label) if many else "stack"
        origin: dict[str, Any] = {"base": self.run.base, "unet": self.run.unet, "column": column.label}
        if column.entries or (column.tagged and self.run.tags):
            origin |= {"adapters": [self._written(entry) for entry in column.entries], "mode": self.run.mode}
        tags = [{"tags": written} if column.tagged and written else {} for written in self._written_tags]
        origins = [origin | of_prompt for of_prompt in tags for _ in range(self.run.settings.num_images)]
        sampler = type(self.pipe.scheduler).__name__.removesuffix("Scheduler")
        folder = output / (named if column is not self.columns[0] else "base")
        return save_images(images, self.run.settings, folder, sampler=sampler, origins=origins)

    def _written(self, entry: StackEntry) -> str:
        """The reference that gives this entry, with the weight it has here."""
        position = [other.label for other in self.entries].index(entry.label)
        return str(replace(self.run.adapters[position], weight=entry.weight.weight, parts=entry.weight.parts))

    @cached_property
    def _written_tags(self) -> list[list[dict[str, str]]]:
        """For each prompt, the adapters of its tags and the hashes of their files."""
        digest = cache(lambda source: hash_files(find_bundle(AdapterRef(source)).files))
        return [
            [{"adapter": str(ref), "sha256": digest(ref.source)} for ref in refs]
            for refs in self.run.tags or [()] * len(self.texts)
        ]


def _reading_once() -> Callable[[AdapterRef], Adapter]:
    """``read_adapter`` that reads every source once, however many prompts ask for it."""
    known: dict[str, Adapter] = {}

    def read(ref: AdapterRef) -> Adapter:
        if ref.source not in known:
            known[ref.source] = read_adapter(ref)
        return known[ref.source]

    return read


def _read_entries(refs: Sequence[AdapterRef], read: Callable[[AdapterRef], Adapter]) -> list[StackEntry]:
    return read_stack(list(refs), read=read) if refs else []


def _is_text_only(entry: StackEntry) -> bool:
    return all(part.startswith("text_encoder") for part in entry.adapter.parts)


def _alike(numbers: Sequence[int], *, key: Callable[[int], list[StackEntry]]) -> list[list[int]]:
    """The numbers whose entries are the same, together, in the order of their first."""
    groups: list[list[int]] = []
    for number in numbers:
        group = next((members for members in groups if key(members[0]) == key(number)), None)
        if group is None:
            groups.append([number])
        else:
            group.append(number)
    return groups
