"""Pictures of several variants in common batches: the same prompts and the same noise for all.

Text adapters act before the first step, so their prompts are encoded each under its own stack and share the U-Net's
batches. Low-rank stacks of the U-Net ride beside it, one for each picture of a batch. Whatever else there is (a
schedule, DoRA in the U-Net) is put on for batches of its own. Variants that are the same arithmetic are drawn once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.per_sample import are_low_rank, per_sample_adapters
from texforce_hub.errors import ConfigError
from texforce_hub.evaluate.evaluation import Sampling
from texforce_hub.generate.draw import DrawSettings, sample
from texforce_hub.generate.prompts.encode import encode_prompts
from texforce_hub.generate.prompts.weighting import cuts_said
from texforce_hub.hub.stack import Item, StackEntry, read_stack

_APART = 1_000_003
"""Between the noise of one seed and the next: more than anybody has prompts."""

Way = Literal["plain", "encoded", "beside", "alone"]


@dataclass(frozen=True)
class Variant:
    """What to evaluate: a stack (anything ``apply_adapter`` takes), a U-Net in place of the pipeline's, or both."""

    stack: Any = ()
    unet: Any = None


@dataclass(frozen=True, slots=True)
class Job:
    """One picture: of which variant, of which prompt by its number, at which seed."""

    variant: str
    index: int
    prompt: str
    seed: int

    @property
    def noise(self) -> int:
        """The seed of the generator of this picture's noise; the same for every variant."""
        return self.seed * _APART + self.index


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures of one call of the pipeline, and how their stacks act in it."""

    way: Way
    unet: Any
    jobs: tuple[Job, ...]


class Easel:
    """A pipeline and the variants to draw with it, their stacks read and looked at once.

    ``same`` tells, for every variant, the first one that is the same arithmetic: whose pictures it shares.

    Raises:
        ConfigError: a variant that is none, or whose U-Net is none.
    """

    def __init__(self, pipe: Any, variants: Mapping[str, Variant], sampling: Sampling, *, strict: bool = True) -> None:
        self.pipe = pipe
        self.sampling = sampling
        self.strict = strict
        self._unets = {name: variant.unet for name, variant in variants.items()}
        self._entries = {name: _read(variant.stack) for name, variant in variants.items()}
        self._items: dict[str, list[Item]] = {
            name: [entry.item for entry in entries] for name, entries in self._entries.items()
        }
        self.same = self._find_same()
        self._ways = self._choose_ways()

    def plan(self, prompts: Mapping[int, str]) -> list[Batch]:
        """The batches of all pictures of these prompts, by their numbers; every time the same.

        A batch holds whole prompts while they fit, each under all variants that can share it.
        """
        groups: dict[Any, tuple[Way, Any, list[str]]] = {}
        for name in dict.fromkeys(self.same.values()):
            way, unet = self._ways[name], self._unets[name]
            key = name if way == "alone" else (way, id(unet))
            groups.setdefault(key, (way, unet, []))[2].append(name)
        return [
            Batch(way, unet, tuple(jobs))
            for way, unet, names in groups.values()
            for jobs in self._divide(names, prompts)
        ]

    def draw(self, batches: Iterable[Batch]) -> Iterator[tuple[tuple[Job, ...], Tensor]]:
        """Each batch's jobs and their pictures ``(b, 3, h, w)`` in [0, 1], float32; afterwards all is as it was."""
        for batch in batches:
            with quiet(self.pipe), cuts_said(), torch.no_grad(), self._on(batch):
                pictures = self._call(batch)
            yield batch.jobs, pictures

    def _divide(self, names: Sequence[str], prompts: Mapping[int, str]) -> Iterator[list[Job]]:
        """Jobs prompt by prompt, in batches that begin with a prompt where all of it fits into one."""
        size = self.sampling.batch_size
        whole = max(1, size // (len(names) * len(self.sampling.seeds)))
        numbers = list(prompts)
        for start in range(0, len(numbers), whole):
            jobs = [
                Job(name, index, prompts[index], seed)
                for index in numbers[start : start + whole]
                for name in names
                for seed in self.sampling.seeds
            ]
            yield from (jobs[i : i + size] for i in range(0, len(jobs), size))

    @contextmanager
    def _on(self, batch: Batch) -> Iterator[None]:
        """The pipeline with what a batch needs on it."""
        stacks = [self._items[job.variant] for job in batch.jobs]
        with ExitStack() as stack:
            if batch.unet is not None:
                stack.enter_context(replaced_unet(self.pipe, batch.unet))
            if batch.way == "alone":
                stack.enter_context(apply_adapter(self.pipe, stacks[0], strict=self.strict))
            if batch.way == "beside":
                stack.enter_context(per_sample_adapters(self.pipe, stacks, strict=self.strict))
            yield

    def _call(self, batch: Batch) -> Tensor:
        texts, negative = [job.prompt for job in batch.jobs], self.sampling.negative_prompt
        settings = DrawSettings(
            tuple(texts), inference_steps=self.sampling.inference_steps, guidance=self.sampling.guidance
        )
        given: dict[str, Any] = {"prompt": texts}
        if batch.way == "encoded":
            stacks = [self._items[job.variant] for job in batch.jobs]
            how: dict[str, Any] = {"guided": settings.guidance > 1, "prompt_weights": "off", "strict": self.strict}
            given = encode_prompts(self.pipe, texts, stacks, negative_prompt=negative, **how)
        elif negative:  # without one, SDXL's is zeros, not an empty text
            given["negative_prompt"] = [negative] * len(texts)
        noise = [job.noise for job in batch.jobs]
        pictures: Tensor = sample(self.pipe, settings, noise, given, output_type="pt").float()
        return pictures

    def _find_same(self) -> dict[str, str]:
        first: dict[str, str] = {}
        for name in self._entries:
            first[name] = next((other for other in first if self._is_same(name, other)), name)
        return first

    def _is_same(self, name: str, other: str) -> bool:
        if self._unet(name) is not self._unet(other):
            return False
        mine, theirs = (_acting(self._entries[n]) for n in (name, other))
        return len(mine) == len(theirs) and all(
            _weighs(a) == _weighs(b) and a.adapter == b.adapter for a, b in zip(mine, theirs)
        )

    def _unet(self, name: str) -> Any:
        return self._unets[name] if self._unets[name] is not None else getattr(self.pipe, "unet", None)

    def _choose_ways(self) -> dict[str, Way]:
        """How each variant is drawn; those over one U-Net share batches as far as that is exact."""
        ways: dict[str, Way] = {}
        for unet in {id(self._unet(name)): self._unet(name) for name in self._entries}.values():
            names = [name for name in self._entries if self._unet(name) is unet]
            own = {name: self._way(name) for name in names}
            if "beside" in own.values():
                own |= {name: "beside" for name in names if own[name] != "alone" and self._is_low_rank(name)}
            if "encoded" in own.values():
                own |= {name: "encoded" for name in names if own[name] == "plain"}
            ways |= own
        return ways

    def _way(self, name: str) -> Way:
        entries = self._entries[name]
        if not entries:
            return "plain"
        if not all(entry.weight.is_constant for entry in entries):
            return "alone"
        if all(part.startswith("text_encoder") for entry in entries for part in entry.adapter.parts):
            return "encoded"
        return "beside" if self._is_low_rank(name) else "alone"

    def _is_low_rank(self, name: str) -> bool:
        return are_low_rank(self.pipe, self._entries[name])


def _read(stack: Any) -> list[StackEntry]:
    empty = stack is None or (isinstance(stack, list | tuple) and not stack)
    return [] if empty else read_stack(stack, scheduled=True)


def _acting(entries: Sequence[StackEntry]) -> list[StackEntry]:
    """The entries that change something: not those at weight 0."""
    return [entry for entry in entries if not _is_zero(entry)]


def _is_zero(entry: StackEntry) -> bool:
    weight = entry.weight
    if weight.ramp or weight.ramps:
        return False
    empty = weight.window[0] == weight.window[1]
    return empty or all(weight.weight_of(name) == 0 for name in entry.adapter.layers)


def _weighs(entry: StackEntry) -> tuple[Any, ...]:
    weight = entry.weight
    return weight.weight, weight.parts, weight.window, weight.ramp, weight.ramps


@contextmanager
def replaced_unet(pipe: Any, unet: Any) -> Iterator[None]:
    """The pipeline with another U-Net, and afterwards with its own.

    Raises:
        ConfigError: a pipeline that has no U-Net.
    """
    if getattr(pipe, "unet", None) is None:
        raise ConfigError(f"{type(pipe).__name__} has no U-Net that another could stand in for")
    before, pipe.unet = pipe.unet, unet
    try:
        yield
    finally:
        pipe.unet = before


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """No progress bar from the pipeline, and afterwards what it had."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
