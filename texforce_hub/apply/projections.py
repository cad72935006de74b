"""Attention projections that ``fuse_qkv_projections`` has joined: which rows of the joined layer each of them is.

The library leaves the single layers where they were. Nobody calls them any more.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from texforce_hub.apply.model import unwrapped

_JOINED: Mapping[str, tuple[str, ...]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


@dataclass(frozen=True, slots=True)
class Joined:
    """The joined layer of an attention that one projection is part of: its name there, itself, the first row."""

    name: str
    layer: nn.Module
    start: int


def find_joined(attention: nn.Module, projection: str) -> Joined | None:
    """The joined layer with this projection's rows, called or not; ``None`` if there is no such layer."""
    for name, members in _JOINED.items():
        layer = getattr(attention, name, None)
        if projection in members and isinstance(layer, nn.Module):
            before = members[: members.index(projection)]
            rows = [unwrapped(attention.get_submodule(member)).get_parameter("weight").shape[0] for member in before]
            return Joined(name, unwrapped(layer), sum(rows))
    return None


def calls_joined(attention: nn.Module) -> bool:
    """Whether the attention computes with its joined layer, not with the single ones.

    Attentions that can be divided again say so themselves. The older kind keeps its mark for good; what it calls is
    up to its processor.
    """
    if hasattr(type(attention), "unfuse_projections"):  # of the class: what a module lacks takes it long to miss
        return bool(getattr(attention, "fused_projections", False))
    processor = vars(attention).get("processor", attention._modules.get("processor"))
    return "Fused" in type(processor).__name__
