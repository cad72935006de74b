"""Layer by layer: is there such a weight in the base, and has it the shape that the adapter changes?"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from texforce_hub.apply.base import BaseShapes, read_base
from texforce_hub.apply.targets import Answer, Fitting, Idle, Misfit, Outline, fit
from texforce_hub.errors import DialectError
from texforce_hub.families.order import natural
from texforce_hub.files.container import find_zeros
from texforce_hub.formats.plan.idle import find_idle
from texforce_hub.formats.plan.layers import LayerPlan
from texforce_hub.formats.plan.planning import Plan
from texforce_hub.hub.bundles import Bundle, plan_bundle
from texforce_hub.hub.find import find_bundle
from texforce_hub.hub.refs.adapter import AdapterRef


@dataclass(frozen=True, slots=True, repr=False)
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

    def __repr__(self) -> str:
        counts = {"unmatched": self.unmatched, "misshapen": self.misshapen, "unreadable": self.unreadable}
        others = "".join(f", {len(layers)} {name}" for name, layers in counts.items() if layers)
        return f"Fit({self.verdict!r:.200}: {len(self.matched)} layers matched{others})"

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
    idle: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)

    def take(self, name: str, answer: Answer) -> None:
        """Note the answer for one layer."""
        if isinstance(answer, Misfit):
            (self.misshapen if answer.kind == "shape" else self.unmatched)[name] = answer.reason
            return
        if answer.note:
            self.notes.append(answer.note)
        (self.idle if isinstance(answer, Idle) else self.matched).append(name)
        if isinstance(answer, Fitting) and answer.renamed:
            self.renamed.append(name)


def check_adapter(ref: str | Path | AdapterRef, base: str | Path | BaseShapes, *, strict: bool = True) -> Fit:
    """Whether an adapter fits a base; only headers and configs are read.

    A text encoder's layers that fit only another text encoder of the base go there, with a note. ``strict``: as in
    :func:`~texforce_hub.apply.applied.apply_adapter`: without it, layers that the base lacks are left out, and an
    adapter fits of which any others match.

    Raises:
        RefError, FileError, DialectError: the adapter cannot be read.
        PipelineError, FamilyError: the base is none that is known.

    Example:
        >>> from texforce_hub import check_adapter
        >>> check_adapter("shapes-colour", "shapes").fits
        True
    """
    base = base if isinstance(base, BaseShapes) else read_base(base)  # before anything is fetched
    bundle = find_bundle(ref)
    try:
        planned = plan_bundle(bundle)
    except DialectError as error:
        raise DialectError(f"{bundle.path}: {error}") from error
    outcome = _Sorted(notes=[*planned.notes, *planned.faults])
    outcome.unreadable |= {layer.name: layer.faults[0] for layer in planned.layers.values() if layer.faults}
    readable = {name: layer for name, layer in planned.layers.items() if not layer.faults}
    answers = _fit_or_idle(readable, base, bundle)
    for name in sorted(answers, key=natural):
        outcome.take(name, answers[name])
    if outcome.renamed:
        outcome.notes.append(
            f"{len(outcome.renamed)} layers have the names of the authors' own code, e.g. {outcome.renamed[0]}: "
            "applied under diffusers' names, fused ones divided by rows"
        )
    wrong_layers = outcome.misshapen or planned.faults or (strict and outcome.unmatched)
    fits = bool(outcome.matched) and not wrong_layers
    verdict = _verdict(planned, base, outcome, fits=fits)
    wrong = (outcome.unmatched, outcome.misshapen, outcome.unreadable)
    return Fit(fits, verdict, tuple(outcome.matched), *wrong, tuple(dict.fromkeys(outcome.notes)))


def _fit_or_idle(layers: Mapping[str, LayerPlan], base: BaseShapes, bundle: Bundle) -> dict[str, Answer]:
    """The answer for every layer; the tensors of those that the base lacks are looked at: zeros decide nothing."""
    outlines = {name: Outline(layer.shape, layer.decomposed == "in") for name, layer in layers.items()}
    answers = fit(outlines, base)
    missing = [name for name, answer in answers.items() if isinstance(answer, Misfit) and answer.kind == "missing"]
    idle = find_idle((layers[name] for name in missing), partial(find_zeros, bundle.files if missing else ()))
    return fit(outlines, base, idle.__contains__) if idle else answers


def _verdict(planned: Plan, base: BaseShapes, outcome: _Sorted, *, fits: bool) -> str:
    total = len(planned.layers)
    made_for = planned.family.summary
    if fits:
        if outcome.unmatched:
            left_out = f"{len(outcome.unmatched)} are not in it and are left out"
            return f"fits in part: {len(outcome.matched)} of {total} layers match {base.title}, {left_out}"
        matching = f"{len(outcome.matched)} of {total} layers match" if outcome.idle else f"all {total} layers match"
        return f"fits: {matching} {base.title}" + (", the others change nothing" if outcome.idle else "")
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
