"""Put changes on modules and take them off exactly. The only writer of a model's weights.

Two ways, both undone bit for bit:

- :func:`attach` puts a low-rank pair beside a layer, as a PEFT tuner layer under an adapter name of its own,
  so that the pipeline's own calls (``set_adapters``, ``disable_lora``, ``unload_lora_weights``) see it. The
  weight itself is never touched.
- :func:`write` changes a parameter in place; :func:`begin_write` has kept a copy. Undoing copies it back;
  nothing is ever subtracted. Writes on one parameter may be undone in any order: those above are computed
  anew from what lies below them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Conv2d as LoraConv2d
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import wide
from texforce_hub.apply.model import unwrapped
from texforce_hub.apply.rounding import Loss, Term, rounded_sum, summed
from texforce_hub.errors import MatchError

TunerLayer = BaseTunerLayer
_WRAPPERS: Mapping[type[nn.Module], Any] = {nn.Linear: LoraLinear, nn.Conv2d: LoraConv2d}


def can_attach(module: nn.Module) -> bool:
    """Whether a low-rank pair can ride beside this layer. Subclasses may read their weight some other way."""
    return type(unwrapped(module)) in _WRAPPERS and not getattr(unwrapped(module), "groups", 1) > 1


@dataclass(eq=False, slots=True)
class Write:
    """A change written into one parameter, with what lay there before."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    saved: Tensor
    terms: Sequence[Term] = field(default_factory=tuple)
    seed: int | None = None  # of stochastic rounding; None: to the nearest
    loss: Loss | None = None  # of the last writing; None for parameters of float32 and wider


# Per parameter, the writes on it, oldest first: what one handle must know of another's.
_PILES: Any = WeakIdKeyDictionary()  # parameter → list[Write]


def begin_write(module: nn.Module, name: str, *, seed: int | None = None) -> Write:
    """Copy what a parameter holds, so that whatever happens later can be undone; with a seed, stochastic rounding.

    Nothing is written yet: who keeps the entry before :func:`write` can undo even a write cut off midway.
    """
    parameter = module.get_parameter(name)
    return Write(module, name, parameter, parameter.detach().clone(), seed=seed)


@torch.no_grad()
def write(entry: Write, terms: Sequence[Term]) -> None:
    """Add the terms to the parameter in place, instead of what the entry wrote before.

    Entries above it are computed anew.
    """
    entry.terms = terms
    pile: list[Write] = _PILES.setdefault(_present(entry), [])
    if entry not in pile:
        pile.append(entry)
    _settle(pile, pile.index(entry), entry.saved)


@torch.no_grad()
def undo(entry: Write) -> None:
    """Give the parameter back what it held; a second call does nothing."""
    pile: list[Write] = _PILES.get(entry.parameter, [])
    if entry in pile:
        parameter = _present(entry)
        position = pile.index(entry)
        if position + 1 == len(pile):
            parameter.copy_(entry.saved)
        else:
            _settle(pile, position + 1, entry.saved)
        del pile[position]


def keep(entry: Write) -> None:
    """Make a write permanent: the copy of what was there is dropped."""
    pile: list[Write] = _PILES.get(entry.parameter, [])
    if pile[:1] != [entry]:
        raise MatchError("only the first stack on a weight can be kept: take the others off first")
    del pile[0]


def _settle(pile: list[Write], start: int, below: Tensor) -> None:
    """Write the pile's entries from ``start`` on, the first of them on ``below``."""
    for entry in pile[start:-1]:
        entry.saved = below
        below = _add(entry, None)
    pile[-1].saved = below
    _add(pile[-1], pile[-1].parameter.detach())


def _add(entry: Write, out: Tensor | None) -> Tensor:
    """An entry's sum on what it saved, into ``out`` if there is one; its loss is noted."""
    if entry.saved.dtype.itemsize >= 4:
        return summed(entry.saved, entry.terms, out=out)
    result, entry.loss = rounded_sum(entry.saved, entry.terms, entry.seed)
    return result if out is None else out.copy_(result)


def _present(entry: Write) -> nn.Parameter:
    if entry.module._parameters.get(entry.name) is not entry.parameter:
        raise MatchError(
            f"the weights that were written to have been replaced since (sequential offload, or a new "
            f"{type(entry.module).__name__}.{entry.name}); take the stack off before moving the model that way"
        )
    return entry.parameter


@dataclass(frozen=True, eq=False, slots=True)
class Attachment:
    """A low-rank pair beside one layer: where it sits and under which adapter name."""

    parent: nn.Module
    child: str
    wrapper: Any  # a LoraLayer
    name: str

    @torch.no_grad()
    def fill(self, pair: LowRank) -> None:
        """New values, in place, for the pair; its scale goes into ``up``."""
        down, up = self.wrapper.lora_A[self.name].weight, self.wrapper.lora_B[self.name].weight
        down.copy_(pair.down.view(down.shape))
        up.copy_((pair.scale * wide(pair.up)).view(up.shape))

    @property
    def live(self) -> bool:
        """Whether it is still in the model: ``unload_lora_weights`` may have taken it off."""
        here: Any = self.parent._modules.get(self.child)
        return here is self.wrapper and self.name in here.r


def attach(root: nn.Module, path: str, name: str, pair: LowRank) -> Attachment:
    """Put a pair beside the layer at ``path``, in the layer's dtype and on its device.

    Other adapters of the layer stay as active and as trainable as they were.
    """
    parent_path, _, child = path.rpartition(".")
    parent, module = root.get_submodule(parent_path), root.get_submodule(path)
    wrapper: Any
    with torch.device("meta"):  # the values are ours: no initialisation is computed
        wrapper = module if isinstance(module, LoraLayer) else _wrap(module, name, pair.rank)
        if wrapper is module:
            _extend(wrapper, name, pair.rank)
    weight = unwrapped(module).get_parameter("weight")
    for half, value in ((wrapper.lora_A, pair.down), (wrapper.lora_B, pair.scale * wide(pair.up))):
        shape = half[name].weight.shape
        moved = value.detach().to(weight.device, weight.dtype, copy=True).view(shape)
        half[name].weight = nn.Parameter(moved, requires_grad=False)
    if wrapper is not module:
        setattr(parent, child, wrapper)
    return Attachment(parent, child, wrapper, name)


def detach(root: nn.Module, path: str, name: str) -> None:
    """Take a pair off; the layer itself comes back if nothing else rides beside it. Twice is once.

    Looks at the model only, so that a pair whose :func:`attach` was cut off midway goes too.
    """
    wrapper: Any = root.get_submodule(path)
    if not isinstance(wrapper, LoraLayer):
        return
    books = [getattr(wrapper, attribute) for attribute in (*wrapper.adapter_layer_names, *wrapper.other_param_names)]
    ours = [book for book in books if name in book]
    for book in ours:
        del book[name]
    if ours and not wrapper.lora_A and not wrapper.lora_embedding_A:
        parent, _, child = path.rpartition(".")
        setattr(root.get_submodule(parent), child, wrapper.base_layer)


def _config(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False)


def _wrap(module: nn.Module, name: str, rank: int) -> Any:
    wrapper: Any = _WRAPPERS[type(module)](module, name, config=_config(rank), r=rank, lora_alpha=rank)
    return wrapper.train(module.training)


def _extend(wrapper: Any, name: str, rank: int) -> None:
    flags = [(parameter, parameter.requires_grad) for parameter in wrapper.parameters()]
    active = wrapper.active_adapters
    try:
        wrapper.update_layer(name, rank, lora_alpha=rank, config=_config(rank))
    finally:
        wrapper._active_adapter = active
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def free_name(roots: Sequence[nn.Module]) -> str:
    """An adapter name that none of these models uses: ``texforce``, ``texforce_2`` …"""
    taken = {name for root in roots for name in getattr(root, "peft_config", {})}
    number = 1
    while (name := "texforce" if number == 1 else f"texforce_{number}") in taken:
        number += 1
    return name


def register(root: Any, name: str, ranks: Mapping[str, int]) -> None:
    """Enter an attached stack in the model's list of adapters, and make it active beside the others."""
    widest = max(ranks.values())
    config = LoraConfig(
        r=widest,
        lora_alpha=widest,
        target_modules=sorted(ranks),
        rank_pattern=dict(ranks),
        alpha_pattern=dict(ranks),
        inference_mode=True,
    )
    if getattr(root, "peft_config", None):
        root.peft_config[name] = config  # in place: a PeftModel around the encoder shares this dictionary
    else:
        root.peft_config = {name: config}
    root._hf_peft_config_loaded = True
    layers = list(tuner_layers(root))
    others: list[str] = next((layer.active_adapters for layer in layers if layer.active_adapters != [name]), [])
    for layer in layers:  # the library asks one layer for the whole model's active adapters: all must agree
        active = others if layer.active_adapters == [name] else layer.active_adapters
        layer._active_adapter = [*(other for other in active if other != name), name]


def unregister(root: Any, name: str) -> None:
    """Strike a stack from the model's list; the other adapters keep their state. Twice is once."""
    for layer in tuner_layers(root):
        if name in layer.active_adapters:
            layer._active_adapter = [other for other in layer.active_adapters if other != name]
    books: dict[str, Any] = getattr(root, "peft_config", None) or {}
    if books.pop(name, None) is not None and not books:
        del root.peft_config
        root._hf_peft_config_loaded = None


def activate(root: nn.Module, name: str, *, active: bool) -> None:
    """Switch one attached stack on or off, leaving every other adapter as it is."""
    for layer in tuner_layers(root):
        others = [other for other in layer.active_adapters if other != name]
        layer._active_adapter = [*others, name] if active else others


def tuner_layers(root: nn.Module) -> Iterator[BaseTunerLayer]:
    """The tuner layers of a model, whoever put them there."""
    return (module for module in root.modules() if isinstance(module, BaseTunerLayer))
