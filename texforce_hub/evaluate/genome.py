"""The weights of a stack as a vector: one number an adapter, a part or a block."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from texforce_hub.families.names import part_of
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.stack import Item, StackEntry

Per = Literal["adapter", "part", "block"]


@dataclass(frozen=True, slots=True)
class Genome:
    """The weights of a stack as a vector: one number an adapter, a part or a block, in ``[low, high]``."""

    entries: tuple[StackEntry, ...]
    keys: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, entries: Sequence[StackEntry], per: Per) -> "Genome":
        """The vector of a stack; ``per`` says what has a weight of its own."""
        keys: list[tuple[int, str]] = []
        for index, entry in enumerate(entries):
            names = [""] if per == "adapter" else [_block_of(name, per) for name in entry.adapter.layers]
            keys += [(index, name) for name in dict.fromkeys(names)]
        return cls(tuple(entries), tuple(keys))

    @property
    def start(self) -> np.ndarray:
        """The weights that the stack has itself, as a vector."""
        return np.array([self._first_weight(*key) for key in self.keys])

    def _first_weight(self, index: int, name: str) -> float:
        entry = self.entries[index]
        layers = (layer for layer in entry.adapter.layers if not name or layer_is_in(layer, name))
        return entry.weight.weight_of(next(layers))

    def number_of(self, index: int, layer: str) -> int:
        """Which number of the vector is the weight of a layer of the stack's ``index``-th adapter."""
        fitting = [(i, name) for i, name in self.keys if i == index and (not name or layer_is_in(layer, name))]
        return self.keys.index(max(fitting, key=lambda key: len(key[1])))

    def refs(self, vector: np.ndarray) -> tuple[AdapterRef, ...]:
        """The stack's references at a vector of weights."""
        weights: list[dict[str, float]] = [{} for _ in self.entries]
        for (index, name), value in zip(self.keys, vector, strict=True):
            weights[index][name] = round(float(value), 4)
        return tuple(
            replace(entry.weight, weight=of[""], parts=()) if "" in of else _by_parts(entry.weight, of)
            for entry, of in zip(self.entries, weights)
        )

    def items(self, vector: np.ndarray) -> list[Item]:
        """The stack at a vector of weights, as ``apply_adapter`` takes it."""
        return [(entry.adapter, ref) for entry, ref in zip(self.entries, self.refs(vector))]


def layer_is_in(layer: str, name: str) -> bool:
    """Whether a layer belongs to a part or block."""
    return layer == name or layer.startswith(f"{name}.")


def _by_parts(ref: AdapterRef, weights: dict[str, float]) -> AdapterRef:
    return replace(ref, weight=1.0, parts=tuple(weights.items()))


def _block_of(layer: str, per: Per) -> str:
    """The part or the block of a layer, as a reference's weights name it."""
    part = part_of(layer)
    if per == "part":
        return part
    pieces = layer.split(".")
    numbered = next((i for i, piece in enumerate(pieces) if piece.isdigit()), 1)
    return ".".join(pieces[: numbered + 1])
