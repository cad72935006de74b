"""What a page shows, read from folders: pictures side by side, tables, training curves, adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from texforce_hub.evaluate.statistics import Interval
from texforce_hub.generate.axes import Axis

_SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Shot:
    """A drawn picture: where it lies, and what each reward gave it."""

    path: Path
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sweep:
    """Variants of one stack that differ in one weight or two, the first axis moving fastest."""

    stack: str
    axes: tuple[Axis, ...]
    variants: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gallery:
    """The same prompts, from the same noise, under several variants; the first is what the others are compared with.

    ``shots`` are by variant and the prompt's index. A variant may lack some: a run that is not finished.
    ``choices``: those one compares with the first; variants of a sweep alone are not among them.
    """

    title: str
    variants: tuple[str, ...]
    prompts: tuple[str, ...]
    shots: Mapping[tuple[str, int], Shot]
    choices: tuple[str, ...]
    sweeps: tuple[Sweep, ...] = ()
    reward: str = ""  # the one whose scores stand under the pictures
    facts: tuple[str, ...] = ()  # how they were drawn, in words


@dataclass(frozen=True, slots=True)
class Row:
    """One variant's mean, and how it compares with the base; nothing of that for the base itself."""

    variant: str
    mean: Interval
    difference: Interval | None = None
    wins: Interval | None = None
    p: float | None = None  # corrected for there being several
    resolvable: float | None = None
    is_swept: bool = False  # drawn for a sweep alone: its weight is no candidate

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``unresolved`` against the base; empty for the base itself."""
        if self.difference is None or self.p is None:
            return ""
        if not self.difference.excludes_zero or self.p >= _SIGNIFICANT:
            return "unresolved"
        return "better" if self.difference.mean > 0 else "worse"


@dataclass(frozen=True, slots=True)
class Measure:
    """One reward on one group of prompts, for every variant."""

    name: str
    group: str
    prompts: int
    rows: tuple[Row, ...]
    held_out: bool = False

    @property
    def title(self) -> str:
        """``alignment, held-out prompts``."""
        return f"{self.name}, {self.group} prompts"


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a run had to show, and whether it did."""

    text: str
    difference: Interval
    met: bool


@dataclass(frozen=True, slots=True)
class Training:
    """A run's rewards by step, and those of its validations."""

    title: str
    steps: tuple[int, ...]
    rewards: tuple[float, ...]
    validations: tuple[tuple[int, float], ...]
    facts: tuple[str, ...] = ()
    sheet: Path | None = None  # its last pictures


@dataclass(frozen=True, slots=True)
class Content:
    """All that folders hold for a page, and in ``left_out``, line by line, what they do not.

    ``stacks``: of references with their weights, whose adapters are looked into; ``base`` and ``unet``: what they were
    drawn on, empty where nothing says.
    """

    title: str
    measures: Sequence[Measure] = ()
    requirements: Sequence[Requirement] = ()
    galleries: Sequence[Gallery] = ()
    trainings: Sequence[Training] = ()
    stacks: Sequence[tuple[str, ...]] = ()
    prompts: Sequence[str] = ()
    base: str = ""
    unet: str = ""
    left_out: Sequence[str] = ()


def join(contents: Sequence[Content]) -> Content:
    """Several folders' contents as one page's; the first says the title and the base."""
    first = contents[0]

    def gather(name: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(value for content in contents for value in getattr(content, name)))

    lists = ("stacks", "prompts", "left_out")
    whole = ("measures", "requirements", "galleries", "trainings")
    return Content(
        title=" · ".join(content.title for content in contents),
        base=next((content.base for content in contents if content.base), ""),
        unet=first.unet,
        **{name: gather(name) for name in lists},
        **{name: tuple(value for content in contents for value in getattr(content, name)) for name in whole},
    )
