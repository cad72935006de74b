"""What the adapters of a stack add to a weight: each layer's part of it, its weight, on the device that it is for."""

from collections.abc import Callable, Mapping, Sequence

import torch

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.moving import move_layers
from texforce_hub.adapter.rows import take_rows
from texforce_hub.adapter.value import Layer, LayerName
from texforce_hub.apply.matching import Contribution, Contributions, ParameterKey
from texforce_hub.apply.placement import place
from texforce_hub.apply.summing import Term
from texforce_hub.hub.stack import StackEntry

Layers = Mapping[LayerName, Layer]


def bring_layers(
    entries: Sequence[StackEntry], contributions: Contributions, device_of: Callable[[ParameterKey], torch.device]
) -> dict[ParameterKey, list[Layer]]:
    """For each parameter the layers that contribute to it, on its device; an adapter goes to a device as a whole."""
    wanted: dict[tuple[torch.device, int], dict[LayerName, Layer]] = {}
    devices = {key: device_of(key) for key in contributions}
    for key, of_key in contributions.items():
        for index, name, *_ in of_key:
            wanted.setdefault((devices[key], index), {})[name] = entries[index].adapter.layers[name]
    there = {(device, index): move_layers(layers, device) for (device, index), layers in wanted.items()}
    return {
        key: [there[devices[key], index][name] for index, name, *_ in of_key] for key, of_key in contributions.items()
    }


def make_term(entry: StackEntry, contribution: Contribution, layer: Layer | None = None) -> Term:
    """One layer's change of a parameter, and its weight; ``layer`` is the adapter's, where it lies elsewhere by now."""
    _, name, rows, block = contribution
    layer = entry.adapter.layers[name] if layer is None else layer
    layer = layer if rows is None else take_rows(layer, rows)
    return (layer if block is None else place(layer, block)), entry.weight.weight_of(name)


def make_pairs(
    entries: Sequence[StackEntry], contributions: Sequence[Contribution], layers: Sequence[Layer | None] | None = None
) -> list[tuple[LowRank, float]]:
    """The low-rank changes of a parameter by these contributions, and their weights; PEFT makes none of rank 0."""
    layers = [None] * len(contributions) if layers is None else layers
    terms = [make_term(entries[c[0]], c, layer) for c, layer in zip(contributions, layers, strict=True)]
    return [(layer.of_some_rank(), weight) for layer, weight in terms if isinstance(layer, LowRank)]
