"""The axes of a grid: a weight, or a setting of the drawing, at several values."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from texforce_hub.errors import ConfigError
from texforce_hub.generate.schedulers import read_scheduler

MOST_AXES, MOST_COLUMNS = 3, 1000
SETTINGS = {"seed": "seed", "guidance": "guidance", "cfg": "guidance", "steps": "inference_steps"}
SETTINGS |= {"scheduler": "scheduler", "sampler": "scheduler", "prompt": "prompt"}
"""What can be swept beside the weights of adapters, and the setting that it is."""

_RANGE = re.compile(r"(?P<start>[^:,]+):(?P<stop>[^:,]+):(?P<count>\d{1,9})")
_EXPECTED = "expected NAME=FROM:TO:COUNT with COUNT from 2, or NAME=A,B,C; e.g. style=0:1:5 or scheduler=ddim,euler"


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: the label of an adapter, or a setting, and the values that it takes."""

    name: str
    values: tuple[Any, ...]

    @property
    def is_setting(self) -> bool:
        """Whether it is a setting of the drawing, not a weight."""
        return self.name in SETTINGS.values()

    def label(self, value: Any) -> str:
        """``style=0.5``; of replaced words only what stands there now."""
        if self.name == "prompt":
            return str(value)
        short = "steps" if self.name == "inference_steps" else self.name
        return f"{short}={value:g}" if isinstance(value, float) else f"{short}={value}"

    def change(self, prompt: str, value: Any) -> str:
        """A prompt with the axis' first words replaced by ``value``, as A1111's "prompt S/R" does."""
        return prompt.replace(str(self.values[0]), str(value))


def read_axes(sweeps: Sequence[str]) -> tuple[Axis, ...]:
    """The axes of ``NAME=…`` texts, the first across, the second down, the third from sheet to sheet.

    Raises:
        ConfigError: what cannot be read, too many axes or too many cells, or one name twice.
    """
    axes = tuple(map(read_axis, sweeps))
    if len(axes) > MOST_AXES:
        raise ConfigError(f"{len(axes)} times --sweep; a grid has at most {MOST_AXES} axes")
    names = [axis.name for axis in axes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--sweep: {twice!r} is swept twice; give all its values in one")
    if (count := math.prod(len(axis.values) for axis in axes)) > MOST_COLUMNS:
        raise ConfigError(f"--sweep asks for {count:,} pictures of every prompt; at most {MOST_COLUMNS:,} are drawn")
    return axes


def read_axis(text: str) -> Axis:
    """``NAME=FROM:TO:COUNT``, evenly spaced with both ends, or ``NAME=A,B,C``.

    Raises:
        ConfigError: anything else.
    """
    name, equals, written = text.partition("=")
    name = SETTINGS.get(name, name)
    try:
        if not equals or not name:
            raise ValueError
        if name in ("prompt", "scheduler"):
            values: list[Any] = [value.strip() for value in written.split(",") if value.strip()]
        else:
            values = _numbers(written)
        if len(values) < 2:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--sweep {text!r}; {_EXPECTED}") from None
    if name == "scheduler":
        values = [read_scheduler(value) for value in values]
    if name in ("seed", "inference_steps"):
        values = [_whole(text, value) for value in values]
    return Axis(name, tuple(dict.fromkeys(values)))


def _numbers(written: str) -> list[float]:
    match = _RANGE.fullmatch(written)
    if match is None:
        values = [float(value) for value in written.split(",")]
    else:
        start, stop, count = float(match["start"]), float(match["stop"]), int(match["count"])
        if count > MOST_COLUMNS:
            raise ConfigError(f"--sweep asks for {count:,} columns; at most {MOST_COLUMNS:,} are drawn")
        values = [start + (stop - start) * i / (count - 1) for i in range(count)] if count > 1 else []
    if not all(map(math.isfinite, values)):
        raise ValueError
    return values


def _whole(text: str, value: float) -> int:
    if value != int(value) or value < 0:
        raise ConfigError(f"--sweep {text!r}: {value:g} is no whole number from 0")
    return int(value)


def points(axes: Sequence[Axis]) -> list[tuple[Any, ...]]:
    """Every combination of the axes' values, the first axis moving fastest."""
    return [tuple(reversed(values)) for values in product(*(axis.values for axis in reversed(axes)))]
