"""Layers of zeros: they change nothing, so they decide neither the family nor whether a file fits, and are named."""

from collections.abc import Callable, Collection, Iterable, Mapping

from texforce_hub.families.names import part_of
from texforce_hub.families.recognition import find_misfits
from texforce_hub.formats.plan.layers import LayerPlan

FindZeros = Callable[[Collection[str]], set[str]]
"""Which of a file's tensors, by their names, hold nothing but zeros."""

_BESIDE = ("alpha", "dora", "magnitude", "unused")


def find_idle(layers: Iterable[LayerPlan], find_zeros: FindZeros) -> set[str]:
    """The names of those layers that change nothing: a scale of zero, or a factor that is all zeros."""
    plain = [layer for layer in layers if not layer.faults and not layer.twins and layer.decomposed is None]
    factors = {layer.name: [key for role, key in layer.keys.items() if role not in _BESIDE] for layer in plain}
    zeros = find_zeros([key for keys in factors.values() for key in keys])
    return {layer.name for layer in plain if layer.scale == 0 or not zeros.isdisjoint(factors[layer.name])}


def leave_out_idle(
    layers: Mapping[str, LayerPlan], find_zeros: FindZeros | None
) -> tuple[dict[str, LayerPlan], list[str]]:
    """The layers without those few of zeros on whose account alone a family does not fit, and a line that names them.

    ComfyUI's extraction writes a pair for each weight of its own text encoder, also for the one that only it has.
    """
    if find_zeros is None:
        return dict(layers), []
    for misfits in find_misfits({name: layer.shape for name, layer in layers.items() if layer.shape}):
        kept = {name: layer for name, layer in layers.items() if name not in misfits}
        whole_part = {part_of(name) for name in misfits} - {part_of(name) for name in kept}
        if not whole_part and find_idle((layers[name] for name in misfits), find_zeros) == set(misfits):
            some = f"{len(misfits)} layer{'s' if len(misfits) > 1 else ''} of zeros, e.g. {misfits[0]},"
            return kept, [f"{some} left out: not every base has such a layer, and nothing is changed by it"]
    return dict(layers), []
