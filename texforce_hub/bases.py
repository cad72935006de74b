"""The base's weights, for layers whose change depends on them (DoRA)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from texforce_hub.adapter import LayerName
from texforce_hub.errors import MergeError
from texforce_hub.families import live_name
from texforce_hub.matching import parts_of, plain
from texforce_hub.patch import unwrapped

Base = Any
"""A pipeline, a bare model, or a mapping from layer names to weights."""


def find_weight(base: Base | None, name: LayerName) -> Tensor | None:
    """The base's weight under a layer's name; ``None`` without a base.

    Raises:
        MergeError: the base has no such layer.
    """
    if base is None:
        return None
    mapped = isinstance(base, Mapping)
    weight = base.get(name, base.get(f"{name}.weight")) if mapped else _live_weight(base, name)
    if not isinstance(weight, Tensor):
        raise MergeError(f"the base has no weight for {name}; expected the model the adapter was made for")
    return weight.detach()


def _live_weight(base: Base, name: LayerName) -> Any:
    part, _, path = name.partition(".")
    modules = parts_of(base)
    if part not in modules:
        return None
    root = plain(modules[part])
    live = live_name(path, hasattr(root, "text_model"))
    try:
        return getattr(unwrapped(root.get_submodule(live)), "weight", None)
    except AttributeError:
        return _live_parameter(root, live)


def _live_parameter(root: nn.Module, path: str) -> Any:
    """A parameter by its own name (a bias, a norm's weight), as vector layers name theirs."""
    module, _, parameter = path.rpartition(".")
    try:
        return getattr(unwrapped(root.get_submodule(module)), parameter, None)
    except AttributeError:
        return None
