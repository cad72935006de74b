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


class KeepingLinear(LoraLinear):
    """PEFT's layer around an ``nn.Linear`` that keeps what its base held before anything was fused into it."""

    before_fusing: "Mapping[str, Tensor] | None" = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: FBT001, FBT002
        """As PEFT does it, after a copy."""
        _keep_base(self)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """The base to the bit, where PEFT subtracts."""
        super().unmerge()
        _restore_base(self)


class KeepingConv2d(LoraConv2d):
    """The same around an ``nn.Conv2d``."""

    before_fusing: "Mapping[str, Tensor] | None" = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: FBT001, FBT002
        """As PEFT does it, after a copy."""
        _keep_base(self)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """The base to the bit, where PEFT subtracts."""
        super().unmerge()
        _restore_base(self)


def _keep_base(wrapper: Any) -> None:
    if not wrapper.merged_adapters:
        with torch.inference_mode(mode=False):
            parameters = wrapper.get_base_layer()._parameters.items()
            wrapper.before_fusing = {name: p.detach().clone() for name, p in parameters if p is not None}


def _restore_base(wrapper: Any) -> None:
    for name, value in (wrapper.before_fusing or {}).items():
        put(wrapper.get_base_layer().get_parameter(name).detach(), value)
    wrapper.before_fusing = None


_WRAPPERS: Mapping[type[nn.Module], tuple[Any, Any]] = {
    nn.Linear: (LoraLinear, KeepingLinear),
    nn.Conv2d: (LoraConv2d, KeepingConv2d),
}
_KEEPING: Mapping[type, type] = dict(_WRAPPERS.values())
_PLAIN: Mapping[type, type] = {keeping: plain for plain, keeping in _KEEPING.items()}


def can_attach(module: nn.Module) -> bool:
    """Whether a low-rank pair can ride beside this layer. Subclasses may read their weight some other way."""
    return type(unwrapped(module)) in _WRAPPERS and not getattr(unwrapped(module), "groups", 1) > 1


class Wrappers:
    """PEFT's tuner layers for one adapter name: PEFT builds one for each kind of layer, the others are its copies."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._templates: dict[object, _Template] = {}

    def around(self, module: nn.Module, rank: int) -> Any:
        """A tuner layer around the module, its halves still without numbers."""
        facts = tuple((k, v) for k, v in module.__dict__.items() if k[0] != "_" and isinstance(v, int | str | tuple))
        key = (type(module), facts, rank)
        if key not in self._templates:
            self._templates[key] = _Template(self._build(module, rank))
        wrapper = self._templates[key].copy()
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
        self.own = [name for name, value in self.facts.items() if isinstance(value, dict | list | set)]
        inner = module._modules.items()
        self.children = [(name, _Template(child)) for name, child in inner if child is not None]

    def copy(self) -> Any:
        """Another such module, with dictionaries and lists of its own."""
        module = object.__new__(self.kind)
        facts = module.__dict__
        facts.update(self.facts)
        for name in self.own:
            facts[name] = facts[name].copy()
        modules = facts["_modules"]
        for name, child in self.children:
            modules[name] = child.copy()
        return module


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
