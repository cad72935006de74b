"""Content as a page draws it: pictures as addresses, numbers as marks on planes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from texforce_hub.evaluate.report.charts import Plane, make_plane, thin_out
from texforce_hub.evaluate.report.content import Content, Gallery, Measure, Row, Shot, Sweep, Training
from texforce_hub.evaluate.report.pictures import Embedded, embed, embed_all
from texforce_hub.evaluate.statistics import Interval
from texforce_hub.generate.images.curve import running_mean
from texforce_hub.hub.pictures import open_picture

_SHEET_SIDE = 1400  # pixels of a training run's sheet, which has small print


@dataclass(frozen=True, slots=True)
class After:
    """A picture beside the first variant's: the variants that it is of, by number, and their score as written."""

    picture: Embedded
    variants: tuple[int, ...]
    score: str


@dataclass(frozen=True, slots=True)
class Card:
    """One prompt: the first variant's picture and those of the others, each different picture once."""

    number: int
    prompt: str
    before: Embedded
    score: str
    after: tuple[After, ...]


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of a curve: where it stands and what it says."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True)
class Curve:
    """A chart: its frame, its band if it has one, its lines, its dots."""

    plane: Plane
    lines: tuple[str, ...]
    dots: tuple[Dot, ...]
    band: str = ""


@dataclass(frozen=True, slots=True)
class SweepView:
    """A sweep's controls: its variants by number, and the reward over the weight, as a curve or by cell in [0, 1]."""

    sweep: Sweep
    variants: tuple[int, ...]
    measure: str = ""
    curve: Curve | None = None
    cells: tuple[tuple[str, float | None], ...] = ()

    @property
    def title(self) -> str:
        """The names of what is turned."""
        return " and ".join(axis.name for axis in self.sweep.axes)


@dataclass(frozen=True, slots=True)
class GalleryView:
    """A gallery's controls and cards; ``first`` is the number of the variant that is shown in the beginning."""

    gallery: Gallery
    cards: tuple[Card, ...]
    choices: tuple[tuple[int, str], ...]
    sweeps: tuple[SweepView, ...]
    first: int
    is_small: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """One row of a table, with its interval as pixels on a line of ``MARK_WIDTH``."""

    row: Row
    low: float
    mean: float
    high: float


@dataclass(frozen=True, slots=True)
class MeasureView:
    """A table: one reward on one group of prompts."""

    measure: Measure
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class TrainingView:
    """A training run: its curve, and its last sheet."""

    training: Training
    curve: Curve
    sheet: Embedded | None


MARK_WIDTH = 120


def view_measure(measure: Measure) -> MeasureView:
    """A table's intervals on one scale."""
    least = min(row.mean.low for row in measure.rows)
    width = (max(row.mean.high for row in measure.rows) - least) or 1.0

    def place(value: float) -> float:
        return round(4 + (value - least) / width * (MARK_WIDTH - 8), 2)

    return MeasureView(
        measure,
        tuple(Mark(row, place(row.mean.low), place(row.mean.mean), place(row.mean.high)) for row in measure.rows),
    )


def view_training(training: Training) -> TrainingView:
    """A run's rewards faint, their running mean, and the validations as dots on a line of their own."""
    values = [*training.rewards, *(value for _, value in training.validations)]
    plane = make_plane([*training.steps, *(step for step, _ in training.validations)], values, width=720, height=260)
    raw = thin_out(list(zip(training.steps, training.rewards, strict=True)))
    smooth = thin_out(list(zip(training.steps, running_mean(training.rewards), strict=True)))
    checked = training.validations
    lines = (plane.line(raw), plane.line(smooth), plane.line(checked) if checked else "")
    dots = tuple(Dot(plane.x(step), plane.y(value), f"step {step}: {value:.3f}") for step, value in checked)
    sheet = None if training.sheet is None else embed(open_picture(training.sheet), side=_SHEET_SIDE)
    return TrainingView(training, Curve(plane, lines, dots), sheet)


def view_galleries(content: Content, *, budget: int) -> tuple[list[GalleryView], list[str]]:
    """All galleries, their pictures made as small as it takes to fit into ``budget`` bytes; and what that means."""
    paths = [shot.path for gallery in content.galleries for shot in _by_prompt(gallery)]
    embedded, side = embed_all(paths, budget=budget)
    views = [view_gallery(gallery, embedded, content.measures) for gallery in content.galleries]
    lines = [f"{gallery.title}: no picture yet" for gallery in content.galleries if not gallery.shots]
    missing = sum(len(_whole(view.gallery)) - len(view.cards) for view in views)
    lines += [f"{missing} prompts: all of them would not fit into the page"] if missing else []
    return [view for view in views if view.cards], [*lines, *_say_size(embedded, side)]


def _say_size(embedded: Mapping[Path, Embedded], side: int) -> Iterator[str]:
    if any(max(picture.width, picture.height) == side for picture in embedded.values()):
        yield f"pictures are at most {side} pixels wide and high; the folder has them whole"


def _by_prompt(gallery: Gallery) -> Iterator[Shot]:
    for index in range(len(gallery.prompts)):
        for variant in gallery.variants:
            if (shot := gallery.shots.get((variant, index))) is not None:
                yield shot


def _whole(gallery: Gallery) -> list[int]:
    """The prompts that the first variant has drawn: what there is to compare with."""
    return [index for index in range(len(gallery.prompts)) if (gallery.variants[0], index) in gallery.shots]


def view_gallery(gallery: Gallery, embedded: Mapping[Path, Embedded], measures: Sequence[Measure]) -> GalleryView:
    """A gallery's cards and controls."""
    numbers = {name: number for number, name in enumerate(gallery.variants)}
    cards = tuple(card for index in _whole(gallery) if (card := _view_card(gallery, index, embedded)) is not None)
    measure = next((measure for measure in measures if measure.name == gallery.reward), None)
    sweeps = tuple(view_sweep(sweep, numbers, measure) for sweep in gallery.sweeps)
    choices = tuple((numbers[name], name) for name in gallery.choices)
    means = {numbers[row.variant]: row.mean.mean for row in measure.rows if row.variant in numbers} if measure else {}
    best = max((number for number, _ in choices), key=lambda number: means.get(number, 0.0), default=None)
    first = best if best is not None else sweeps[0].variants[-1] if sweeps else 0
    small = all(max(card.before.width, card.before.height) <= 128 for card in cards)
    return GalleryView(gallery, cards, choices, sweeps, first, small, gallery.facts)


def _view_card(gallery: Gallery, index: int, embedded: Mapping[Path, Embedded]) -> Card | None:
    """A prompt's pictures; ``None`` where not all of them are in the page."""
    shots = {number: gallery.shots.get((name, index)) for number, name in enumerate(gallery.variants)}
    drawn = {number: shot for number, shot in shots.items() if shot is not None}
    if not all(shot.path in embedded for shot in drawn.values()):
        return None
    before, groups = embedded[drawn[0].path], dict[Embedded, list[int]]()
    for number, shot in drawn.items():
        if number:
            groups.setdefault(embedded[shot.path], []).append(number)
    scores = {
        number: f"{shot.scores[gallery.reward]:.3f}" if gallery.reward in shot.scores else ""
        for number, shot in drawn.items()
    }
    after = tuple(After(picture, tuple(of), scores[of[0]]) for picture, of in groups.items())
    return Card(index, gallery.prompts[index], before, scores[0], after)


def view_sweep(sweep: Sweep, numbers: Mapping[str, int], measure: Measure | None) -> SweepView:
    """A sweep's controls, and where a reward was measured its curve, or the cells of its pad."""
    variants = tuple(numbers[name] for name in sweep.variants)
    means = {row.variant: row.mean for row in measure.rows} if measure is not None else {}
    if measure is None or not all(name in means for name in sweep.variants):
        return SweepView(sweep, variants, cells=tuple((name, None) for name in sweep.variants))
    intervals = [means[name] for name in sweep.variants]
    if len(sweep.axes) == 1:
        return SweepView(sweep, variants, measure.title, _weight_curve(sweep.axes[0].values, intervals))
    least = min(interval.mean for interval in intervals)
    width = (max(interval.mean for interval in intervals) - least) or 1.0
    cells = tuple((str(interval), (interval.mean - least) / width) for interval in intervals)
    return SweepView(sweep, variants, measure.title, cells=cells)


def _weight_curve(weights: Sequence[float], intervals: Sequence[Interval]) -> Curve:
    edges = [edge for interval in intervals for edge in (interval.low, interval.high)]
    plane = make_plane(weights, edges, width=360, height=180)
    line = plane.line([(weight, interval.mean) for weight, interval in zip(weights, intervals, strict=True)])
    dots = tuple(
        Dot(plane.x(weight), plane.y(interval.mean), f"{weight:g}: {interval}")
        for weight, interval in zip(weights, intervals, strict=True)
    )
    return Curve(plane, (line,), dots, plane.band(weights, intervals))
