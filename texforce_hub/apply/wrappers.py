"""PEFT's tuner layers around a model's layers: built once for each kind of layer, and with a copy of what is fused."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Conv2d as LoraConv2d
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from texforce_hub.apply.model import unwrapped
from texforce_hub.apply.patch import put

NAME = "texforce"
"""What the adapter names of our stacks begin with."""


def _merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: FBT001, FBT002
    """As PEFT does it, after a copy of what the base held before anything was fused into it."""
    if not self.merged_adapters:
        with torch.inference_mode(mode=False):
            parameters = self.get_base_layer()._parameters.items()
            self.before_fusing = {name: p.detach().clone() for name, p in parameters if p is not None}
    _PLAIN[type(self)].merge(self, safe_merge=safe_merge, adapter_names=adapter_names)


def _unmerge(self: Any) -> None:
    """The base to the bit, where PEFT subtracts."""
    _PLAIN[type(self)].unmerge(self)
    for name, value in (self.before_fusing or {}).items():
        put(self.get_base_layer().get_parameter(name).detach(), value)
    self.before_fusing = None


# No common base: Python lets a layer of PEFT's become one of ours, and back, only where each has PEFT's alone.
class KeepingLinear(LoraLinear):
    """PEFT's layer around an ``nn.Linear`` that keeps what its base held before anything was fused into it."""

    before_fusing: "Mapping[str, Tensor] | None" = None
    merge, unmerge = _merge, _unmerge


class KeepingConv2d(LoraConv2d):
    """The same around an ``nn.Conv2d``."""

    before_fusing: "Mapping[str, Tensor] | None" = None
    merge, unmerge = _merge, _unmerge


_WRAPPERS: Mapping[type[nn.Module], tuple[Any, Any]] = {
    nn.Linear: (LoraLinear, KeepingLinear),
    nn.Conv2d: (LoraConv2d, KeepingConv2d),
}
_KEEPING: Mapping[type, type] = dict(_WRAPPERS.values())
_PLAIN: Mapping[type, Any] = {keeping: plain for plain, keeping in _KEEPING.items()}


def can_attach(module: nn.Module) -> bool:
    """Whether a low-rank pair can ride beside this layer. Subclasses may read their weight some other way."""
    layer = unwrapped(module)
    return type(layer) in _WRAPPERS and vars(layer).get("groups", 1) == 1


class Wrappers:
    """PEFT's tuner layers for one adapter name: PEFT builds one for each kind of layer, the others are its copies."""

    def __init__(self, name: str) -> None:
        self.name = name

    def around(self, module: nn.Module, rank: int) -> Any:
        """A tuner layer around the module, its halves still without numbers."""
        facts = tuple([(k, v) for k, v in module.__dict__.items() if k[0] != "_" and isinstance(v, int | str | tuple)])
        key = (self.name, type(module), facts, rank)
        template = _TEMPLATES.get(key)
        if template is None:
            if len(_TEMPLATES) >= _MOST_TEMPLATES:
                _TEMPLATES.clear()
            template = _TEMPLATES[key] = _Template(self._build(module, rank))
        wrapper = template.copy()
        wrapper._modules["base_layer"] = module
        return wrapper

    def _build(self, module: nn.Module, rank: int) -> Any:
        keeping = _WRAPPERS[type(module)][1]
        with torch.device("meta"):  # the values are ours: no initialisation is computed
            wrapper = keeping(module, self.name, config=_config(rank), r=rank, lora_alpha=rank)
        wrapper.train(module.training)
        wrapper._modules["base_layer"] = None
        return wrapper


class _Template:
    """A module that is copied often: what its copies have in common, and what each must have of its own."""

    def __init__(self, module: Any) -> None:
        self.kind = type(module)
        self.facts = dict(module.__dict__)
        own = {name: value for name, value in self.facts.items() if isinstance(value, dict | list | set)}
        self.makers = [(name, value.copy) for name, value in own.items() if name != "_modules"]
        self.children = []
        for name, child in module._modules.items():
            self.children.append((name, None if child is None else _Template(child)))

    def copy(self) -> Any:
        """Another such module, with dictionaries and lists of its own."""
        facts = self.facts.copy()
        for name, make in self.makers:
            facts[name] = make()
        modules = facts["_modules"] = {}
        for name, child in self.children:
            modules[name] = None if child is None else child.copy()
        module = object.__new__(self.kind)
        object.__setattr__(module, "__dict__", facts)
        return module


_TEMPLATES: dict[object, _Template] = {}
"""By adapter name, kind of layer and rank; kept, so that the next stack on the same layers asks PEFT for none."""
_MOST_TEMPLATES = 128


def _config(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False)


def extend(wrapper: Any, name: str, rank: int) -> None:
    """Give a tuner layer that is there already a pair under another name, its halves still without numbers."""
    flags = [(parameter, parameter.requires_grad) for parameter in wrapper.parameters()]
    active = wrapper.active_adapters
    wrapper.__class__ = _KEEPING.get(type(wrapper), type(wrapper))
    try:
        with torch.device("meta"):
            wrapper.update_layer(name, rank, lora_alpha=rank, config=_config(rank))
    finally:
        wrapper._active_adapter = active
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def let_go(wrapper: Any) -> None:
    """Give a layer that others' adapters ride on its class back, unless another stack of ours rides there."""
    if type(wrapper) in _PLAIN and not any(name.startswith(NAME) for name in wrapper.lora_A):
        wrapper.__class__ = _PLAIN[type(wrapper)]
