"""Layer by layer: is there such a weight in the base, and has it the shape that the adapter changes?"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from texforce_hub.apply.base import BaseShapes, Shape, read_base
from texforce_hub.errors import DialectError, FamilyError
from texforce_hub.families.names import part_of, path_of
from texforce_hub.families.original_transformer import find_rows
from texforce_hub.files.container import find_zeros
from texforce_hub.formats.plan.idle import find_idle
from texforce_hub.formats.plan.layers import LayerPlan
from texforce_hub.formats.plan.planning import Plan
from texforce_hub.hub.bundles import Bundle, plan_bundle
from texforce_hub.hub.find import find_bundle
from texforce_hub.hub.refs.adapter import AdapterRef


@dataclass(frozen=True, slots=True)
class Fit:
    """The answer. ``notes`` say what is out of the ordinary.

    ``unmatched`` (no such weight in the base), ``misshapen`` (of another shape) and ``unreadable`` (not whole in the
    file) give each layer's reason.
    """

    fits: bool
    verdict: str
    matched: tuple[str, ...]
    unmatched: Mapping[str, str] = field(default_factory=dict)
    misshapen: Mapping[str, str] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(slots=True)
class _Sorted:
    matched: list[str] = field(default_factory=list)
    unmatched: dict[str, str] = field(default_factory=dict)
    misshapen: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)


def check_adapter(ref: str | Path | AdapterRef, base: str | Path | BaseShapes) -> Fit:
    """Whether an adapter fits a base; only headers and configs are read.

    A text encoder's layers that fit only another text encoder of the base go there, with a note.

    Raises:
        RefError, FileError, DialectError: the adapter cannot be read.
        PipelineError, FamilyError: the base is none that is known.
    """
    bundle = find_bundle(ref)
    base = base if isinstance(base, BaseShapes) else read_base(base)
    try:
        planned = plan_bundle(bundle)
    except DialectError as error:
        raise DialectError(f"{bundle.path}: {error}") from error
    outcome = _Sorted(notes=[*planned.notes, *planned.faults])
    outcome.unreadable |= {layer.name: layer.faults[0] for layer in planned.layers.values() if layer.faults}
    for part, layers in _by_part(planned.layers.values()).items():
        _sort_part(part, layers, base, outcome)
    if outcome.renamed:
        outcome.notes.append(
            f"{len(outcome.renamed)} layers have the names of the authors' own code, e.g. {outcome.renamed[0]}: "
            "applied under diffusers' names, fused ones divided by rows"
        )
    _leave_out_idle(bundle, planned, outcome)
    fits = bool(outcome.matched) and not (outcome.unmatched or outcome.misshapen or planned.faults)
    verdict = _verdict(planned, base, outcome, fits=fits)
    wrong = (outcome.unmatched, outcome.misshapen, outcome.unreadable)
    return Fit(fits, verdict, tuple(outcome.matched), *wrong, tuple(outcome.notes))


def _leave_out_idle(bundle: Bundle, planned: Plan, outcome: _Sorted) -> None:
    """Layers of zeros stand in nobody's way: a base that lacks them lacks nothing."""
    files = [path for path in bundle.files if outcome.unmatched]
    idle = find_idle((planned.layers[name] for name in outcome.unmatched), partial(find_zeros, files))
    for name in sorted(idle):
        outcome.notes.append(f"{name} is all zeros and left out: {outcome.unmatched.pop(name)}")


def _by_part(layers: Iterable[LayerPlan]) -> dict[str, dict[str, LayerPlan]]:
    """The layers that can be read."""
    parts: dict[str, dict[str, LayerPlan]] = {}
    for layer in layers:
        if not layer.faults:
            parts.setdefault(part_of(layer.name), {})[layer.name] = layer
    return parts


def _sort_part(part: str, layers: Mapping[str, LayerPlan], base: BaseShapes, outcome: _Sorted) -> None:
    target = _target_part(part, {name: layer.shape for name, layer in layers.items()}, base)
    if target != part:
        outcome.notes.append(f"named {part} in the adapter, fits only {target}")
    lacks_part = target not in base.parts
    for name in layers:
        weight = target + name.removeprefix(part)
        if lacks_part:
            outcome.unmatched[name] = f"the base has no {part}"
        elif base.shape_of(weight) is None:
            _sort_original(name, layers[name], base, outcome)
        elif misfit := _misfit(weight, layers[name].shape, base):
            outcome.misshapen[name] = misfit
        else:
            outcome.matched.append(name)


def _misfit(weight: str, shape: Shape, base: BaseShapes) -> str | None:
    have = base.shape_of(weight)
    return None if have == shape else f"the adapter changes {shape}, the base's layer is {have}"


def _sort_original(name: str, layer: LayerPlan, base: BaseShapes, outcome: _Sorted) -> None:
    """A layer that the base does not have, unless it is one of the authors' own names for what it has."""
    part, path = part_of(name), path_of(name)
    try:
        rows = find_rows(path, layer.shape) if part == "transformer" else ()
    except FamilyError as error:
        outcome.unmatched[name] = str(error)
        return
    targets = [(f"{part}.{row.path}", (row.count, *layer.shape[1:])) for row in rows]
    missing = [target for target, _ in targets if base.shape_of(target) is None]
    misfits = [misfit for target, shape in targets if (misfit := _misfit(target, shape, base))]
    if missing or not targets:
        outcome.unmatched[name] = f"the base has no layer {(missing or [name])[0]}"
    elif misfits:
        outcome.misshapen[name] = misfits[0]
    elif layer.decomposed == "in" and len(targets) > 1:
        outcome.unmatched[name] = "DoRA normed along its inputs cannot be divided between the base's layers"
    else:
        outcome.matched.append(name)
        outcome.renamed.append(name)


def _target_part(part: str, layers: Mapping[str, Shape], base: BaseShapes) -> str:
    """The part itself, or the one other text encoder into which all its layers fit when none fits its own."""

    def fitting(target: str) -> int:
        return sum(base.shape_of(target + name.removeprefix(part)) == shape for name, shape in layers.items())

    if fitting(part) or not part.startswith("text_encoder"):
        return part
    others = [p for p in base.parts if p.startswith("text_encoder") and p != part and fitting(p) == len(layers)]
    return others[0] if len(others) == 1 else part


def _verdict(planned: Plan, base: BaseShapes, outcome: _Sorted, *, fits: bool) -> str:
    total = len(planned.layers)
    made_for = planned.family.summary
    if fits:
        return f"fits: all {total} layers match {base.title}"
    own = {fault for layer in planned.layers.values() for fault in layer.faults}
    reasons = [
        f"{count} {what}"
        for count, what in (
            (len(outcome.unmatched), "are not in it"),
            (len(outcome.misshapen), "have another shape"),
            (len(outcome.unreadable), "cannot be read"),
            (sum(fault not in own for fault in planned.faults), "faults of the file"),
        )
        if count
    ]
    return f"does not fit: of {total} layers, {', '.join(reasons)}; the adapter is {made_for}, the base {base.title}"
