"""Write changes into a model's parameters and take them out exactly. The only writer of a model's weights.

:func:`begin_write` keeps a copy, :func:`write` changes the parameter in place, :func:`undo` copies back: nothing is
ever subtracted. Writes on one parameter may be undone in any order: those above are computed anew from what lies
below them. What the libraries around us did in between is undone with it: a joined projection that was copied from
the parameter follows it, adapters that PEFT has fused into it since are fused again without ours.

What is kept lives and dies with the model: nothing here holds a parameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from texforce_hub.apply.model import tuner_layers as tuner_layers
from texforce_hub.apply.projections import find_joined
from texforce_hub.apply.summing import Term, rounded_sum, summed
from texforce_hub.errors import MatchError
from texforce_hub.files.memory import fresh_bytes

Owner = tuple[nn.Module, str]
"""A module and the name of its child that is meant."""


@dataclass(frozen=True, eq=False, slots=True)
class Copy:
    """Rows of a joined projection's parameter, from ``start`` on, that were copied from one that is written to."""

    parameter: ReferenceType[nn.Parameter]
    start: int


@dataclass(eq=False, slots=True)
class Write:
    """A change written into one parameter, with what lay there before."""

    module: ReferenceType[nn.Module]
    name: str
    parameter: ReferenceType[nn.Parameter]
    saved: Tensor
    owner: tuple[ReferenceType[nn.Module], str] | None = None
    on: bool = False  # whether there is anything to undo
    terms: Sequence[Term] = field(default_factory=tuple)
    seed: int | None = None  # of stochastic rounding; None: to the nearest
    loss: Tensor | None = None  # of the last writing, as rounded_sum gives it; None for float32 and wider
    fused: tuple[str, ...] = ()  # the adapters that PEFT had fused into the parameter before
    fused_since: tuple[str, ...] | None = None  # those to be fused again; None: undoing has not begun
    copies: list["Copy"] = field(default_factory=list)  # what joined projections took from the parameter


# Per parameter, the writes on it, oldest first: what one handle must know of another's.
_PILES: Any = WeakIdKeyDictionary()  # parameter → list[Write]


def put(target: Tensor, value: Tensor) -> None:
    """Copy a value into a tensor, whether that was made for inference only or not."""
    if torch.is_grad_enabled() or target.is_inference() != torch.is_inference_mode_enabled():
        with torch.inference_mode(target.is_inference()), torch.no_grad():
            target.copy_(value)
    else:
        target.copy_(value)


def make_rooms(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Memory for copies of the parameters, in one piece, for :func:`begin_write`; ``None`` for those elsewhere."""
    plain = [p.device.type == "cpu" and p.is_contiguous() for p in parameters]
    sizes = [p.numel() * p.element_size() if ours else 0 for p, ours in zip(parameters, plain, strict=True)]
    padded = [-(-size // 16) * 16 for size in sizes]
    rooms = torch.split(fresh_bytes(sum(padded)), padded)
    return [
        room[:size].view(p.dtype).view(p.shape) if ours else None
        for p, ours, room, size in zip(parameters, plain, rooms, sizes, strict=True)
    ]


def begin_write(
    module: nn.Module, name: str, *, seed: int | None = None, owner: Owner | None = None, room: Tensor | None = None
) -> Write:
    """Copy what a parameter holds, so that whatever happens later can be undone; with a seed, stochastic rounding.

    Nothing is written yet: who keeps the entry before :func:`write` can undo even a write cut off midway.

    Args:
        owner: the module that the layer is a child of, and its name there.
        room: memory for the copy, from :func:`make_rooms`.
    """
    parameter = module.get_parameter(name)
    with torch.inference_mode(mode=False), torch.no_grad():
        saved = parameter.detach().clone() if room is None else room.copy_(parameter.detach())
    above = None if owner is None else (ref(owner[0]), owner[1])
    return Write(ref(module), name, ref(parameter), saved, above, seed=seed, fused=fused_into(owner))


def fused_into(owner: Owner | None) -> tuple[str, ...]:
    """The adapters that PEFT has fused into a layer, by its owner and its name there."""
    wrapper = None if owner is None else owner[0]._modules.get(owner[1])
    return tuple(getattr(wrapper, "merged_adapters", ()))


def check_writable(entry: Write) -> None:
    """Refuse to write where it would be wrong or lost.

    Raises:
        MatchError: the weights were replaced, or PEFT has fused or unfused adapters there since.
    """
    present(entry)
    if fused_into(_owner(entry)) != entry.fused:
        raise MatchError(
            "fuse_lora() or unfuse_lora() has changed the fused weights since: take that back, or take the stack off"
        )


def write(entry: Write, terms: Sequence[Term]) -> None:
    """Add the terms to the parameter in place, instead of what the entry wrote before.

    Entries above it are computed anew.
    """
    pile: list[Write] = _PILES.setdefault(present(entry), [])
    entry.terms = terms
    if entry in pile:
        _note_copies(entry, pile)
    else:
        entry.on = True
        pile.append(entry)
    _settle(pile, pile.index(entry), entry.saved)
    follow(entry.copies, _above(entry, pile))


def undo(entry: Write) -> None:
    """Give the parameter back what it held; cut off anywhere, or called again, it ends the same."""
    if entry.module() is None:
        entry.on = False
    if entry.on:
        pile: list[Write] = _PILES.get(present(entry), [])
        if entry in pile:
            _take_out(entry, pile)
        entry.on = False
    follow(entry.copies, entry.saved)


def _take_out(entry: Write, pile: list[Write]) -> None:
    if entry.fused_since is None:
        _note_copies(entry, pile)
        entry.fused_since = fused_into(_owner(entry))
    position = pile.index(entry)
    if position + 1 == len(pile):
        put(present(entry).detach(), entry.saved)
    else:
        _settle(pile, position + 1, entry.saved)
    if entry.fused_since != entry.fused:
        _fuse_again(entry, entry.fused_since)
    pile.remove(entry)


def keep(entry: Write) -> None:
    """Make a write permanent: the copy of what was there is dropped."""
    check_keepable(entry)
    entry.on = False
    del _PILES[present(entry)][0]


def check_keepable(entry: Write) -> None:
    """Refuse to make a write permanent that is not the lowest on its weight, or whose weight is gone.

    Raises:
        MatchError: the weights were replaced, or another stack lies below.
    """
    pile: list[Write] = _PILES.get(present(entry), [])
    if pile[:1] != [entry]:
        raise MatchError("only the first stack on a weight can be kept: take the others off first")


def present(entry: Write) -> nn.Parameter:
    """The parameter that was written to, where it was.

    Raises:
        MatchError: it is no longer there.
    """
    module, parameter = entry.module(), entry.parameter()
    if module is None or parameter is None or module._parameters.get(entry.name) is not parameter:
        kind = "layer" if module is None else type(module).__name__
        raise MatchError(
            f"the weights that were written to have been replaced since (sequential offload, or a new "
            f"{kind}.{entry.name}); take the stack off before moving the model that way"
        )
    return parameter


def _settle(pile: list[Write], start: int, below: Tensor) -> None:
    """Write the pile's entries from ``start`` on, the first of them on ``below``."""
    target = present(pile[-1]).detach()
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        for entry in pile[start:-1]:
            entry.saved = below
            below = _add(entry, None)
        pile[-1].saved = below
        _add(pile[-1], target)


def _add(entry: Write, out: Tensor | None) -> Tensor:
    """An entry's sum on what it saved, into ``out`` if there is one; its loss is noted."""
    if entry.saved.dtype.itemsize >= 4:
        return summed(entry.saved, entry.terms, out=out)
    target = out if out is not None and out.is_contiguous() and out.dtype == entry.saved.dtype else None
    result, entry.loss = rounded_sum(entry.saved, entry.terms, entry.seed, target)
    return result if out is None or out is target else out.copy_(result)


def _owner(entry: Write) -> Owner | None:
    module = None if entry.owner is None else entry.owner[0]()
    return None if entry.owner is None or module is None else (module, entry.owner[1])


def _above(entry: Write, pile: list[Write]) -> Tensor:
    """What the parameter holds with this entry and without those above it."""
    above = pile[pile.index(entry) + 1 :]
    return above[0].saved if above else present(entry).detach()


def _note_copies(entry: Write, pile: list[Write]) -> None:
    known = {id(copy.parameter()) for copy in entry.copies}
    copies = find_copies(_owner(entry), entry.name, _above(entry, pile))
    entry.copies += [copy for copy in copies if id(copy.parameter()) not in known]


def find_copies(owner: Owner | None, name: str, value: Tensor) -> list[Copy]:
    """The rows of joined projections that hold this value of a layer's parameter, bit for bit: copied from it."""
    joined = None if owner is None else find_joined(*owner)
    parameter = None if joined is None else joined.layer._parameters.get(name)
    if joined is None or parameter is None:
        return []
    rows = _bottom(parameter)[joined.start : joined.start + value.shape[0]]
    same = rows.shape == value.shape and rows.device == value.device and rows.equal(value)
    return [Copy(ref(parameter), joined.start)] if same else []


def follow(copies: Sequence[Copy], value: Tensor) -> None:
    """Let the joined projections that were copied from a parameter have its value."""
    for copy in copies:
        parameter = copy.parameter()
        if parameter is not None:
            put(_bottom(parameter)[copy.start : copy.start + value.shape[0]], value)
            pile: list[Write] = _PILES.get(parameter, [])
            if pile:
                _settle(pile, 0, pile[0].saved)


def rebase(parameter: nn.Parameter, value: Tensor, adapter: str) -> None:
    """Give a parameter the value it had before PEFT fused an adapter into it; writes made since stay on it."""
    pile: list[Write] = _PILES.get(parameter, [])
    since = [position for position, entry in enumerate(pile) if adapter in entry.fused]
    if not since:
        put(parameter.detach(), value)
        return
    _settle(pile, since[0], value)
    for entry in reversed(pile[since[0] :]):
        entry.fused = tuple(name for name in entry.fused if name != adapter)


def _bottom(parameter: nn.Parameter) -> Tensor:
    """What a parameter holds below all writes."""
    pile: list[Write] = _PILES.get(parameter, [])
    return pile[0].saved if pile else parameter.detach()


def _fuse_again(entry: Write, adapters: Sequence[str]) -> None:
    """Let PEFT fuse its adapters into the restored parameter, as it would have without the entry."""
    owner = _owner(entry)
    wrapper: Any = None if owner is None else owner[0]._modules.get(owner[1])
    if owner is None or not hasattr(wrapper, "merged_adapters"):
        return
    wrapper.merged_adapters = list(entry.fused)
    if not set(entry.fused) <= set(adapters):
        wrapper.unmerge()
    wrapper.merge(adapter_names=[name for name in adapters if name not in wrapper.merged_adapters])
