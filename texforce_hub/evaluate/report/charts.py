"""Curves as shapes on a plane of pixels: points, paths, ticks. The page draws them, no library does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from texforce_hub.evaluate.statistics import Interval


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis: where it stands, in pixels, and what it says."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Plane:
    """A chart's frame: from values to pixels, the y-axis up."""

    width: int
    height: int
    xs: tuple[float, float]
    ys: tuple[float, float]
    left: int = 52
    right: int = 14
    top: int = 12
    bottom: int = 30

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return round(self.left + _share(value, self.xs) * (self.width - self.left - self.right), 2)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return round(self.height - self.bottom - _share(value, self.ys) * (self.height - self.top - self.bottom), 2)

    @property
    def x_ticks(self) -> list[Tick]:
        """Marks below."""
        return [Tick(self.x(value), text) for value, text in round_numbers(self.xs, 6)]

    @property
    def y_ticks(self) -> list[Tick]:
        """Marks on the left."""
        return [Tick(self.y(value), text) for value, text in round_numbers(self.ys, 4)]

    def line(self, points: Sequence[tuple[float, float]]) -> str:
        """The path of a line through points."""
        return "M" + "L".join(f"{self.x(x):g},{self.y(y):g}" for x, y in points)

    def band(self, xs: Sequence[float], intervals: Sequence[Interval]) -> str:
        """The path around a band: along its upper edge, and back along the lower."""
        upper = [(x, interval.high) for x, interval in zip(xs, intervals, strict=True)]
        lower = [(x, interval.low) for x, interval in zip(xs, intervals, strict=True)]
        return f"{self.line([*upper, *reversed(lower)])}Z"


def make_plane(xs: Sequence[float], ys: Sequence[float], *, width: int, height: int, headroom: float = 0.06) -> Plane:
    """A frame around all values, with some room above and below."""
    low, high = min(ys), max(ys)
    room = (high - low) * headroom or max(abs(high), 1e-6) * headroom
    return Plane(width, height, (min(xs), max(xs)), (low - room, high + room))


def round_numbers(span: tuple[float, float], most: int) -> list[tuple[float, str]]:
    """At most so many round numbers inside a span, evenly spaced, with as many digits as tell them apart."""
    low, high = span
    if not high > low:
        return [(low, f"{low:g}")]
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(number * step, f"{number * step + 0.0:.{digits}f}") for number in range(first, last + 1)]


def thin_out(points: Sequence[tuple[float, float]], most: int = 1000) -> list[tuple[float, float]]:
    """At most some thousand points of a long curve, evenly spread, the last one kept."""
    step = max(1, math.ceil(len(points) / most))
    kept = list(points[::step])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _share(value: float, span: tuple[float, float]) -> float:
    low, high = span
    return (value - low) / (high - low) if high > low else 0.5
