"""A live model by our names: its parts, and its weights for layers whose change depends on them (DoRA)."""

import sys
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from texforce_hub.adapter.value import LayerName
from texforce_hub.errors import FamilyError, MatchError, MergeError
from texforce_hub.families import live_name
from texforce_hub.families.names import PARTS, part_of, path_of
from texforce_hub.families.original_transformer import find_rows
from texforce_hub.families.parameters import Shape

Base = Any
"""A pipeline, a bare model, or a mapping from layer names to weights."""


def find_weight(base: Base | None, name: LayerName, shape: Shape) -> Tensor | None:
    """The base's weight under a layer's name, which changes one of this shape; ``None`` without a base.

    Where the name is the authors' own and the base has ``diffusers``' layers, the weight is put together from theirs.

    Raises:
        MergeError: the base has no such layer.
    """
    if base is None:
        return None
    weight = _weight(base, name)
    if weight is None:
        weight = _join(base, name, shape)
    if weight is None:
        raise MergeError(f"the base has no weight for {name}; expected the model the adapter was made for")
    return weight.detach()


def _weight(base: Base, name: LayerName) -> Tensor | None:
    mapped = isinstance(base, Mapping)
    weight = base.get(name, base.get(f"{name}.weight")) if mapped else _live_weight(base, name)
    return weight if isinstance(weight, Tensor) else None


def _join(base: Base, name: LayerName, shape: Shape) -> Tensor | None:
    """The weight of an original layer whose rows ``diffusers`` has in other layers; ``None`` if they do not fit."""
    part, path = part_of(name), path_of(name)
    try:
        targets = find_rows(path, shape) if part == "transformer" else ()
    except FamilyError:
        return None
    weights = [(rows, _weight(base, f"{part}.{rows.path}")) for rows in targets]
    pieces: dict[int, Tensor] = {}
    for rows, weight in weights:
        if weight is None or tuple(weight.shape) != (rows.count, *shape[1:]):
            return None
        ends = accumulate(end - start for start, end in rows.ranges)
        for (start, end), stop in zip(rows.ranges, ends, strict=True):
            pieces[start] = weight[stop - (end - start) : stop]
    return torch.cat([pieces[start] for start in sorted(pieces)]) if pieces else None


def _live_weight(base: Base, name: LayerName) -> Any:
    part, path = part_of(name), path_of(name)
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


def is_tuner(module: object) -> TypeGuard[Any]:
    """Whether this is a layer of PEFT's around another one. PEFT is not imported for it: who has none, has no layer."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and isinstance(module, peft.BaseTunerLayer)


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer itself, out of any tuner layers around it."""
    layer: nn.Module = module.get_base_layer() if is_tuner(module) else module
    return layer


def walk(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, the root's empty; a tuner layer is one module, what is in it is not visited."""
    open_paths: list[tuple[str, nn.Module]] = [("", root)]
    while open_paths:
        path, module = open_paths.pop()
        yield path, module
        if not is_tuner(module):
            prefix = f"{path}." if path else ""
            children = [(prefix + name, child) for name, child in module._modules.items() if child is not None]
            open_paths.extend(reversed(children))


def tuner_layers(root: nn.Module) -> Iterator[Any]:
    """The tuner layers of a model, whoever put them there."""
    return (module for _, module in walk(root) if is_tuner(module))


def parts_of(target: Any) -> dict[str, nn.Module]:
    """The models that adapters can change, by part: a pipeline's, or a bare module as every part of its kind."""
    if not isinstance(target, nn.Module):
        members = {part: getattr(target, part, None) for part in PARTS}
        modules = {part: module for part, module in members.items() if isinstance(module, nn.Module)}
        if not modules:
            raise MatchError(f"{type(target).__name__} has none of the parts {', '.join(PARTS)}; expected a pipeline")
        return modules
    blocks = plain(target)
    denoiser = hasattr(blocks, "down_blocks") or hasattr(blocks, "transformer_blocks")
    return dict.fromkeys(("unet", "transformer") if denoiser else PARTS[:3], target)


def plain(module: nn.Module) -> nn.Module:
    """The model out of ``torch.compile``'s and PEFT's wrappers, whose names would be in the way."""
    while True:
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        elif callable(unwrap := getattr(module, "get_base_model", None)):
            module = unwrap()
        else:
            return module
