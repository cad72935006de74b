"""The columns of a sheet: the base, and what is drawn beside it; the cells of a grid."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from texforce_hub.errors import ConfigError
from texforce_hub.generate.axes import Axis, points, read_axes
from texforce_hub.generate.draw import DrawSettings
from texforce_hub.generate.recipe import DrawRun
from texforce_hub.hub.stack import StackEntry, reweighted


@dataclass(frozen=True, slots=True)
class Column:
    """One way to draw all prompts.

    label: its title
    entries: the stack it is drawn under
    tagged: whether the prompts' tags act too
    settings: how it is sampled, its prompts without tags
    scheduler: the sampler's name; empty: the pipeline's own
    position: the values of the grid's axes; empty outside a grid
    """

    label: str
    settings: DrawSettings
    entries: tuple[StackEntry, ...] = ()
    tagged: bool = True
    scheduler: str = ""
    position: tuple[Any, ...] = field(default=())


def plan_columns(run: DrawRun, entries: Sequence[StackEntry], settings: DrawSettings) -> list[Column]:
    """The base; then the whole stack, or each adapter; or every cell of a grid. Tags act in all but the base.

    One sweep of an adapter's weight has the base beside it.

    Raises:
        ConfigError: both, one of them without a stack or fused, or a sweep of an adapter that is not there.
    """
    axes = read_axes(run.sweeps)
    base = Column("base", settings, tagged=False, scheduler=run.scheduler)
    if run.each and axes:
        raise ConfigError("--each and --sweep both ask for columns; give one of them")
    weighted = [axis.name for axis in axes if not axis.is_setting]
    if (run.each or weighted) and (not entries or run.mode != "attach"):
        raise ConfigError("--each and --sweep draw several stacks at once: give --adapter, and no other --mode")
    if run.each:
        return [base, *(replace(base, label=entry.label, entries=(entry,), tagged=True) for entry in entries)]
    if axes:
        cells = list(_cells(run, axes, entries, settings))
        return [base, *cells] if len(axes) == len(weighted) == 1 else cells
    title = " + ".join([*map(_title, entries), *(["tags"] if run.tags else [])])
    return [base, replace(base, label=title, entries=tuple(entries), tagged=True)] if title else [base]


def _title(entry: StackEntry) -> str:
    """``style:0.8``, by the label that a recipe keeps."""
    weight = entry.weight
    if weight.parts:
        return f"{entry.label}:" + ",".join(f"{part}={number:g}" for part, number in weight.parts)
    return entry.label if weight.weight == 1 else f"{entry.label}:{weight.weight:g}"


def _cells(
    run: DrawRun, axes: Sequence[Axis], entries: Sequence[StackEntry], settings: DrawSettings
) -> Iterator[Column]:
    labels = [entry.label for entry in entries]
    for axis in axes:
        if not axis.is_setting and axis.name not in labels:
            known = ", ".join([*labels, "seed, guidance, steps, scheduler, prompt"])
            raise ConfigError(f"--sweep: no adapter {axis.name!r} in the stack, and no setting; there are {known}")
        if axis.name == "prompt" and not all(str(axis.values[0]) in text for text in settings.prompts):
            raise ConfigError(f"--sweep prompt={axis.values[0]},…: a prompt does not hold {axis.values[0]!r}")
    for position in points(axes):
        values = {axis.name: value for axis, value in zip(axes, position)}
        label = ", ".join(axis.label(value) for axis, value in zip(axes, position))
        changed = {name: values[name] for name in ("seed", "guidance", "inference_steps") if name in values}
        prompts = settings.prompts
        for axis in axes:
            if axis.name == "prompt":
                prompts = tuple(axis.change(text, values["prompt"]) for text in prompts)
        weights = {name: value for name, value in values.items() if name in labels}
        yield Column(
            label,
            replace(settings, prompts=prompts, **changed),
            tuple(reweighted(entries, weights)) if weights else tuple(entries),
            scheduler=values.get("scheduler", run.scheduler),
            position=position,
        )
