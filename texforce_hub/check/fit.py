"""Layer by layer: is there such a weight in the base, and has it the shape that the adapter changes?"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from texforce_hub.bundles import plan_bundle
from texforce_hub.check.base import Base, Shape, read_base
from texforce_hub.dialects import LayerPlan, Plan
from texforce_hub.errors import DialectError
from texforce_hub.locate import find_bundle
from texforce_hub.refs import AdapterRef


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


def check_adapter(ref: str | Path | AdapterRef, base: str | Path | Base) -> Fit:
    """Whether an adapter fits a base; only headers and configs are read.

    A text encoder's layers that fit only another text encoder of the base go there, with a note.

    Raises:
        RefError, FileError, DialectError: the adapter cannot be read.
        PipelineError, FamilyError: the base is none that is known.
    """
    bundle = find_bundle(ref)
    base = base if isinstance(base, Base) else read_base(base)
    try:
        planned = plan_bundle(bundle)
    except DialectError as error:
        raise DialectError(f"{bundle.path}: {error}") from error
    found = _Sorted(notes=[*planned.notes, *planned.faults])
    found.unreadable |= {layer.name: layer.faults[0] for layer in planned.layers.values() if layer.faults}
    for part, layers in _by_part(planned.layers.values()).items():
        _sort_part(part, layers, base, found)
    fits = bool(found.matched) and not (found.unmatched or found.misshapen or planned.faults)
    verdict = _verdict(planned, base, found, fits=fits)
    wrong = (found.unmatched, found.misshapen, found.unreadable)
    return Fit(fits, verdict, tuple(found.matched), *wrong, tuple(found.notes))


def _by_part(layers: Iterable[LayerPlan]) -> dict[str, dict[str, Shape]]:
    """The shapes of the layers that can be read."""
    parts: dict[str, dict[str, Shape]] = {}
    for layer in layers:
        if not layer.faults:
            parts.setdefault(layer.name.partition(".")[0], {})[layer.name] = layer.shape
    return parts


def _sort_part(part: str, layers: Mapping[str, Shape], base: Base, found: _Sorted) -> None:
    home = _home(part, layers, base)
    if home != part:
        found.notes.append(f"named {part} in the adapter, fits only {home}")
    for name, shape in layers.items():
        place = home + name.removeprefix(part)
        have = base.shape_of(place)
        if have is None:
            missing = f"the base has no {part}" if home not in base.parts else f"the base has no layer {place}"
            found.unmatched[name] = missing
        elif tuple(have) != shape:
            found.misshapen[name] = f"the adapter changes {shape}, the base's layer is {tuple(have)}"
        else:
            found.matched.append(name)


def _home(part: str, layers: Mapping[str, Shape], base: Base) -> str:
    """The part itself, or the one other text encoder into which all its layers fit when none fits its own."""

    def fitting(place: str) -> int:
        return sum(base.shape_of(place + name.removeprefix(part)) == shape for name, shape in layers.items())

    if fitting(part) or not part.startswith("text_encoder"):
        return part
    others = [p for p in base.parts if p.startswith("text_encoder") and p != part and fitting(p) == len(layers)]
    return others[0] if len(others) == 1 else part


def _verdict(planned: Plan, base: Base, found: _Sorted, *, fits: bool) -> str:
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
