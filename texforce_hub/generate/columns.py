"""The columns of a sheet: the base, and what is drawn beside it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from texforce_hub.errors import ConfigError
from texforce_hub.generate.recipe import DrawRun
from texforce_hub.hub.stack import StackEntry, reweighted

_SWEEP = re.compile(r"(?P<name>[\w-]+)=(?P<start>[^:]+):(?P<stop>[^:]+):(?P<count>\d+)")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the sheet: its title, the stack it is drawn under, and whether the prompts' tags act too."""

    label: str
    entries: tuple[StackEntry, ...] = ()
    tagged: bool = True


def plan_columns(run: DrawRun, entries: Sequence[StackEntry]) -> list[Column]:
    """The base; then the whole stack, or each adapter, or one at several weights. Tags act in all but the base.

    Raises:
        ConfigError: both, one of them without a stack or fused, or a sweep of an adapter that is not there.
    """
    together = run.each or bool(run.sweep)
    if run.each and run.sweep:
        raise ConfigError("--each and --sweep both ask for columns; give one of them")
    if together and (not entries or run.mode != "attach"):
        raise ConfigError("--each and --sweep draw several stacks at once: give --adapter, and no other --mode")
    base = Column("base", tagged=False)
    if run.each:
        return [base, *(Column(entry.label, (entry,)) for entry in entries)]
    if run.sweep:
        return [base, *_sweep_columns(run.sweep, entries)]
    title = " + ".join([*map(str, run.adapters), *(["tags"] if run.tags else [])])
    return [base, Column(title, tuple(entries))] if title else [base]


def _sweep_columns(sweep: str, entries: Sequence[StackEntry]) -> Iterator[Column]:
    name, weights = sweep_weights(sweep)
    labels = [entry.label for entry in entries]
    if name not in labels:
        raise ConfigError(f"--sweep: no adapter {name!r} in the stack; it has {', '.join(labels)}")
    for weight in weights:
        yield Column(f"{name}={weight:g}", tuple(reweighted(entries, {name: weight})))


def sweep_weights(text: str) -> tuple[str, list[float]]:
    """``NAME=0:1:5`` → the adapter's label and evenly spaced weights, ends included.

    Raises:
        ConfigError: anything else.
    """
    match = _SWEEP.fullmatch(text)
    try:
        if match is not None and int(match["count"]) > 1:
            start, stop, count = float(match["start"]), float(match["stop"]), int(match["count"])
            return match["name"], [start + (stop - start) * i / (count - 1) for i in range(count)]
    except ValueError:
        pass
    raise ConfigError(f"--sweep {text!r}; expected NAME=FROM:TO:COUNT with COUNT of at least 2, e.g. style=0:1:5")
