"""The plans of several files that are one adapter, as one plan."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from texforce_hub.families.recognition import FamilyVerdict, join_verdicts
from texforce_hub.formats.plan.layers import LayerPlan
from texforce_hub.formats.plan.planning import Plan


def join_plans(plans: Mapping[str, Plan]) -> Plan:
    """What several files hold together; ``plans`` are by the files' names, of which there is at least one.

    A layer that two files hold becomes the first one's, the others its twins; files for different families, or
    with different shapes of one layer, are a fault.
    """
    if len(plans) == 1:
        return next(iter(plans.values()))
    layers = _join_layers(plans)
    family = join_verdicts([plan.family for plan in plans.values()], {n: p.shape for n, p in layers.items() if p.shape})
    return Plan(
        dialects=tuple(dict.fromkeys(name for plan in plans.values() for name in plan.dialects)),
        layers=MappingProxyType(layers),
        extras=tuple(key for plan in plans.values() for key in plan.extras),
        family=family,
        metadata=_join_metadata(plans),
        base=next((plan.base for plan in plans.values() if plan.base is not None), None),
        faults=tuple(_find_faults(plans, family)),
        notes=tuple(_find_notes(plans)),
    )


def _join_layers(plans: Mapping[str, Plan]) -> dict[str, LayerPlan]:
    layers: dict[str, LayerPlan] = {}
    for plan in plans.values():
        for name, layer in plan.layers.items():
            first = layers.get(name)
            layers[name] = layer if first is None else replace(first, twins=(*first.twins, layer))
    return layers


def _join_metadata(plans: Mapping[str, Plan]) -> Mapping[str, str]:
    joined: dict[str, str] = {}
    for plan in plans.values():
        joined = dict(plan.metadata) | joined
    return MappingProxyType(joined)


def _shared(plans: Mapping[str, Plan]) -> Iterator[tuple[str, list[str]]]:
    """Layers that several files hold, and the names of these files."""
    names = dict.fromkeys(name for plan in plans.values() for name in plan.layers)
    for name in names:
        holders = [file for file, plan in plans.items() if name in plan.layers]
        if len(holders) > 1:
            yield name, holders


def _find_faults(plans: Mapping[str, Plan], family: FamilyVerdict) -> Iterator[str]:
    for file, plan in plans.items():
        yield from (f"{file}: {fault}" for fault in plan.faults)
    for name, holders in _shared(plans):
        shapes = [plans[file].layers[name].shape for file in holders]
        if len(set(shapes)) > 1:
            yield f"{name} is in {' and '.join(holders)}, with shapes {' and '.join(map(str, shapes))}"
    if not family.candidates and all(plan.family.candidates for plan in plans.values()):
        made = ", ".join(f"{file} for {plan.family.summary}" for file, plan in plans.items())
        yield f"its files do not belong together: {made}"


def _find_notes(plans: Mapping[str, Plan]) -> Iterator[str]:
    for file, plan in plans.items():
        yield from (f"{file}: {note}" for note in plan.notes)
    shared = len(list(_shared(plans)))
    if shared:
        yield f"{shared} layers are in several files; equal ones count once"
    unequal = sorted({k for p in plans.values() for k, v in p.metadata.items() if _join_metadata(plans)[k] != v})
    if unequal:
        more = f" and {len(unequal) - 5} more" if len(unequal) > 5 else ""
        yield f"the files' metadata differ in {', '.join(unequal[:5])}{more}; the first file's count"
