"""A drawing run: load, draw column by column or in one batch, save."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from PIL import Image

from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.composite import check_composite
from texforce_hub.apply.handle import Applied
from texforce_hub.errors import ConfigError, PromptError
from texforce_hub.generate.axes import read_axes
from texforce_hub.generate.columns import Column, plan_columns
from texforce_hub.generate.draw import Cell, generate_cells, generate_images
from texforce_hub.generate.log import logger, saying_once
from texforce_hub.generate.origin import Origin
from texforce_hub.generate.prompts.tags import TaggedPrompt
from texforce_hub.generate.recipe import DrawRun
from texforce_hub.generate.results import (
    Picture,
    check_folder,
    clear_folder,
    folder_name,
    write_column,
    write_list,
    write_sheets,
)
from texforce_hub.generate.schedulers import read_scheduler, set_scheduler
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.stack import StackEntry, read_stack
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.pipelines.save import save_pipeline
from texforce_hub.pipelines.save_checkpoint import save_checkpoint, save_text_encoder
from texforce_hub.reading import first_line

OnStep = Callable[[int], None]
"""Called after each denoising step with the number of pictures that took it."""

_MOST_IMAGES = 100_000


class Drawing:
    """One drawing run, with its pipeline once it is loaded.

    Everything that can be refused without the pipeline is refused when it is made: adapters, prompts, columns.

    Raises:
        RefError, FileError, DialectError, AdapterError: an adapter that cannot be read.
        PromptError: a prompt that holds tags alone.
        ConfigError: a setting that cannot be.
    """

    def __init__(self, run: DrawRun) -> None:
        self.run = run
        if run.rounding not in ("nearest", "stochastic"):
            raise ConfigError(f"--rounding {run.rounding!r}; expected nearest or stochastic")
        if run.scheduler:
            read_scheduler(run.scheduler)
        check_composite(run.composite)
        if run.composite and (run.mode != "attach" or run.each):
            raise ConfigError("--composite needs several adapters that are attached: leave out --mode and --each")
        texts = tuple(TaggedPrompt.parse(prompt).text for prompt in run.settings.prompts)
        if not all(texts):
            raise PromptError(f"{run.settings.prompts[texts.index('')]!r} holds tags alone; expected a word too")
        read = _reading_once()
        self.entries = _read_entries(run.adapters, read)
        self.columns = plan_columns(run, self.entries, replace(run.settings, prompts=texts))
        if (count := self.count) > _MOST_IMAGES:
            raise ConfigError(f"{count:,} pictures in one run; at most {_MOST_IMAGES:,} are drawn")
        self.tags = [_read_entries(refs, read) for refs in run.tags] or [[] for _ in texts]
        self.together = run.each or bool(run.sweeps) or (bool(run.tags) and run.mode == "attach")
        self.together &= not run.composite and all(
            _acts_on_embeddings_once(entry) for entry in (*self.entries, *(e for t in self.tags for e in t))
        )
        self.pipe: Any = None

    @property
    def count(self) -> int:
        """How many pictures the run has."""
        settings = self.run.settings
        return len(settings.prompts) * settings.num_images * len(self.columns)

    @property
    def steps(self) -> int:
        """How many denoising steps all its pictures take together."""
        return sum(len(column.settings.jobs()) * column.settings.inference_steps for column in self.columns)

    def load(self, *, device: str | None = None, dtype: str | None = None, offload: bool = False) -> None:
        """Load the base with its tuned U-Net, and see that every adapter fits it.

        Raises:
            PipelineError: the base or the U-Net cannot be loaded.
            MatchError: an adapter does not fit.
            ConfigError: a scheduler, a clip skip or an offloading that it cannot do.
        """
        target = "cpu" if offload else device
        self.pipe = load_pipeline(self.run.base, unet=self.run.unet or None, device=target, dtype=dtype)
        self.scheduler = self.pipe.scheduler
        for name in dict.fromkeys(column.scheduler for column in self.columns):
            self._choose_scheduler(name)
        _check_clip_skip(self.pipe, self.run.settings.clip_skip or 0)
        if offload:
            try:
                self.pipe.enable_model_cpu_offload()
            except (RuntimeError, ValueError) as error:
                raise ConfigError(f"--offload needs a GPU: {first_line(error)}") from error
        with saying_once():
            self._try_on()

    def draw(self, output: Path, *, force: bool = False, on_step: OnStep | None = None) -> list[Path]:
        """Draw all columns, then write their images and the sheet, whose path comes last.

        Args:
            output: the run's folder, new or empty.
            force: replace the run that is in the folder.

        Raises:
            FileError: the folder holds something.
        """
        check_folder(output, force=force)
        with saying_once():
            drawn = self._draw_columns(on_step or (lambda _count: None))
        clear_folder(output)
        return self._write(output, drawn)

    def save(self, targets: Mapping[str, Path | None], *, portable: bool) -> list[Path]:
        """Bake the stack in, save what is asked for, take it off again."""
        if not any(targets.values()):
            return []
        if not self.entries:
            return list(self._save_all(targets, portable=portable))
        with self._apply(self.entries, "fuse"):
            return list(self._save_all(targets, portable=portable))

    def _save_all(self, targets: Mapping[str, Path | None], *, portable: bool) -> Iterator[Path]:
        if (folder := targets["pipeline"]) is not None:
            yield save_pipeline(self.pipe, folder, portable=portable)
        if (file := targets["checkpoint"]) is not None:
            yield save_checkpoint(self.pipe, file)
        if (file := targets["text_encoder"]) is not None:
            yield from save_text_encoder(self.pipe, file)

    def _write(self, output: Path, drawn: Sequence[list[Image.Image]]) -> list[Path]:
        origin, paths, used = Origin(self.run, self.entries), list[Path](), set[str]()
        for column, images in zip(self.columns, drawn):
            self._choose_scheduler(column.scheduler)
            sampler = type(self.pipe.scheduler).__name__.removesuffix("Scheduler")
            texts = origin.texts(column, images, sampler=sampler)
            pictures = [Picture(image, text) for image, text in zip(images, texts)]
            paths += write_column(output / self._folder(column, used), pictures)
        axes, labels = read_axes(self.run.sweeps), [column.label for column in self.columns]
        swept = any(axis.name == "seed" for axis in axes)
        rows = [prompt if swept else f"{prompt} · seed {seed}" for prompt, seed in self.run.settings.jobs()]
        paths += write_sheets(output, drawn, rows=rows, labels=labels, axes=axes)
        write_list(output, paths)
        return paths

    def _folder(self, column: Column, used: set[str]) -> str:
        many = self.run.each or bool(self.run.sweeps)
        name = folder_name(column.label) if many else "base" if column is self.columns[0] else "stack"
        while name in used:  # two labels that differ in what a file's name cannot hold
            name += "_"
        used.add(name)
        return name

    def _choose_scheduler(self, name: str) -> None:
        self.pipe.scheduler = self.scheduler
        if name:
            set_scheduler(self.pipe, name)

    def _apply(self, entries: Sequence[StackEntry], mode: str) -> Applied:
        rounding = self.run.rounding if mode == "fuse" else "nearest"
        how = {"mode": mode, "rounding": rounding, "seed": self.run.settings.seed, "strict": self.run.strict}
        how["composite"] = self.run.composite
        return apply_adapter(self.pipe, [entry.item for entry in entries], **cast(Any, how))

    def _try_on(self) -> None:
        """Put every adapter on and off once, so that one that does not fit is refused before the first picture."""
        for entry in (*self.entries, *(entry for tagged in self.tags for entry in tagged)):
            with self._apply([entry], "attach") as applied:
                for reason in dict.fromkeys(applied.dead_layers(self.run.settings.clip_skip or 0).values()):
                    logger.warning("%s", reason)

    def _stack(self, column: Column, number: int) -> list[StackEntry]:
        """What acts on one prompt in one column: the column's stack, then the prompt's own."""
        return [*column.entries, *(self.tags[number] if column.tagged else [])]

    def _draw_columns(self, on_step: OnStep) -> list[list[Image.Image]]:
        """The images of each column; those of equal steps, guidance and sampler in the same batches."""
        drawn: dict[int, list[Image.Image]] = {}
        for members in _alike(range(len(self.columns)), key=lambda i: _sampled_alike(self.columns[i])):
            columns = [self.columns[i] for i in members]
            self._choose_scheduler(columns[0].scheduler)
            images = self._draw_together(columns, on_step) if self.together else self._draw_in_turn(columns, on_step)
            drawn |= dict(zip(members, images))
        return [drawn[i] for i in range(len(self.columns))]

    def _draw_in_turn(self, columns: Sequence[Column], on_step: OnStep) -> Iterator[list[Image.Image]]:
        """Column by column; in each, the prompts under one stack after those under another."""
        for column in columns:
            images: dict[int, list[Image.Image]] = {}
            numbers, size = range(len(column.settings.prompts)), column.settings.num_images
            for members in _alike(numbers, key=lambda number: self._stack(column, number)):
                group = self._draw_under(column, self._stack(column, members[0]), members, on_step)
                images |= {number: group[i * size : (i + 1) * size] for i, number in enumerate(members)}
            yield [image for number in numbers for image in images[number]]

    def _draw_under(
        self, column: Column, stack: Sequence[StackEntry], members: Sequence[int], on_step: OnStep
    ) -> list[Image.Image]:
        settings = replace(column.settings, prompts=tuple(column.settings.prompts[number] for number in members))
        if not stack:
            return generate_images(self.pipe, settings, on_step=on_step)
        with self._apply(stack, self.run.mode):
            return generate_images(self.pipe, settings, on_step=on_step)

    def _draw_together(self, columns: Sequence[Column], on_step: OnStep) -> list[list[Image.Image]]:
        """All columns in the same batches: one U-Net call a step, whatever the number of stacks."""
        cells: list[Cell] = []
        for column in columns:
            for number, text in enumerate(column.settings.prompts):
                stack = [entry.item for entry in self._stack(column, number)] or None
                cells += [(text, column.settings.seed + i, stack) for i in range(column.settings.num_images)]
        images = generate_cells(self.pipe, columns[0].settings, cells, on_step=on_step, strict=self.run.strict)
        size = len(columns[0].settings.jobs())
        return [images[i * size : (i + 1) * size] for i in range(len(columns))]


def _sampled_alike(column: Column) -> tuple[Any, ...]:
    return column.settings.inference_steps, column.settings.guidance, column.scheduler


def _check_clip_skip(pipe: Any, clip_skip: int) -> None:
    """Refuse to skip more layers than a text encoder has."""
    for part in ("text_encoder", "text_encoder_2"):
        layers = getattr(getattr(getattr(pipe, part, None), "config", None), "num_hidden_layers", None)
        if layers is not None and clip_skip >= layers:
            raise ConfigError(f"--clip-skip {clip_skip}: the base's {part} has {layers} layers; skip fewer")


def _reading_once() -> Callable[[AdapterRef], Adapter]:
    """``read_adapter`` that reads every source once, however many prompts ask for it."""
    known: dict[str, Adapter] = {}

    def read(ref: AdapterRef) -> Adapter:
        if ref.source not in known:
            known[ref.source] = read_adapter(ref)
        return known[ref.source]

    return read


def _read_entries(refs: Sequence[AdapterRef], read: Callable[[AdapterRef], Adapter]) -> list[StackEntry]:
    return read_stack(list(refs), read=read, scheduled=True) if refs else []


def _acts_on_embeddings_once(entry: StackEntry) -> bool:
    """Whether an adapter acts before the first step and no more, so that a batch can hold several stacks."""
    return entry.weight.is_constant and all(part.startswith("text_encoder") for part in entry.adapter.parts)


def _alike(numbers: Sequence[int], *, key: Callable[[int], Any]) -> list[list[int]]:
    """The numbers whose keys are equal, together, in the order of their first."""
    groups: list[list[int]] = []
    for number in numbers:
        group = next((members for members in groups if key(members[0]) == key(number)), None)
        if group is None:
            groups.append([number])
        else:
            group.append(number)
    return groups
