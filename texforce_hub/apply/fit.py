"""Layer by layer: is there such a weight in the base, and has it the shape that the adapter changes?"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from texforce_hub.apply.base import BaseShapes, Shape, read_base
from texforce_hub.errors import DialectError, FamilyError
from texforce_hub.families.original_transformer import find_rows
from texforce_hub.formats.plan.layers import LayerPlan
from texforce_hub.formats.plan.planning import Plan
from texforce_hub.hub.bundles import plan_bundle
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
    found = _Sorted(notes=[*planned.notes, *planned.faults])
    found.unreadable |= {layer.name: layer.faults[0] for layer in planned.layers.values() if layer.faults}
    for part, layers in _by_part(planned.layers.values()).items():
        _sort_part(part, layers, base, found)
    if found.renamed:
        found.notes.append(
            f"{len(found.renamed)} layers have the names of the authors' own code, e.g. {found.renamed[0]}: "
            "applied under diffusers' names, fused ones divided by rows"
        )
    fits = bool(found.matched) and not (found.unmatched or found.misshapen or planned.faults)
    verdict = _verdict(planned, base, found, fits=fits)
    wrong = (found.unmatched, found.misshapen, found.unreadable)
    return Fit(fits, verdict, tuple(found.matched), *wrong, tuple(found.notes))


def _by_part(layers: Iterable[LayerPlan]) -> dict[str, dict[str, LayerPlan]]:
    """The layers that can be read."""
    parts: dict[str, dict[str, LayerPlan]] = {}
    for layer in layers:
        if not layer.faults:
            parts.setdefault(layer.name.partition(".")[0], {})[layer.name] = layer
    return parts


def _sort_part(part: str, layers: Mapping[str, LayerPlan], base: BaseShapes, found: _Sorted) -> None:
    home = _home(part, {name: layer.shape for name, layer in layers.items()}, base)
    if home != part:
        found.notes.append(f"named {part} in the adapter, fits only {home}")
    lacks_part = home not in base.parts
    for name in layers:
        place = home + name.removeprefix(part)
        if lacks_part:
            found.unmatched[name] = f"the base has no {part}"
        elif base.shape_of(place) is None:
            _sort_original(name, layers[name], base, found)
        elif misfit := _misfit(place, layers[name].shape, base):
            found.misshapen[name] = misfit
        else:
            found.matched.append(name)


def _misfit(place: str, shape: Shape, base: BaseShapes) -> str | None:
    have = base.shape_of(place)
    return None if have == shape else f"the adapter changes {shape}, the base's layer is {have}"


def _sort_original(name: str, layer: LayerPlan, base: BaseShapes, found: _Sorted) -> None:
    """A layer that the base does not have, unless it is one of the authors' own names for what it has."""
    part, _, path = name.partition(".")
    try:
        rows = find_rows(path, layer.shape) if part == "transformer" else ()
    except FamilyError as error:
        found.unmatched[name] = str(error)
        return
    places = [(f"{part}.{row.path}", (row.count, *layer.shape[1:])) for row in rows]
    missing = [place for place, _ in places if base.shape_of(place) is None]
    misfits = [misfit for place, shape in places if (misfit := _misfit(place, shape, base))]
    if missing or not places:
        found.unmatched[name] = f"the base has no layer {(missing or [name])[0]}"
    elif misfits:
        found.misshapen[name] = misfits[0]
    elif layer.decomposed == "in" and len(places) > 1:
        found.unmatched[name] = "DoRA normed along its inputs cannot be divided between the base's layers"
    else:
        found.matched.append(name)
        found.renamed.append(name)


def _home(part: str, layers: Mapping[str, Shape], base: BaseShapes) -> str:
    """The part itself, or the one other text encoder into which all its layers fit when none fits its own."""

    def fitting(place: str) -> int:
        return sum(base.shape_of(place + name.removeprefix(part)) == shape for name, shape in layers.items())

    if fitting(part) or not part.startswith("text_encoder"):
        return part
    others = [p for p in base.parts if p.startswith("text_encoder") and p != part and fitting(p) == len(layers)]
    return others[0] if len(others) == 1 else part


def _verdict(planned: Plan, base: BaseShapes, found: _Sorted, *, fits: bool) -> str:
    total = len(planned.layers)
    made_for = planned.family.summary
    if fits:
        return f"fits: all {total} layers match {base.title}"
    own = {fault for layer in planned.layers.values() for fault in layer.faults}
    reasons = [
        f"{count} {what}"
        for count, what in (
            (len(found.unmatched), "are not in it"),
            (len(found.misshapen), "have another shape"),
            (len(found.unreadable), "cannot be read"),
            (sum(fault not in own for fault in planned.faults), "faults of the file"),
        )
        if count
    ]
    return f"does not fit: of {total} layers, {', '.join(reasons)}; the adapter is {made_for}, the base {base.title}"
