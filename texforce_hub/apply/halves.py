"""The numbers of attached pairs: laid out in one piece of memory for all layers, and written there once."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.moving import move_all
from texforce_hub.adapter.tensors import holds_numbers, wide
from texforce_hub.errors import AdapterError
from texforce_hub.files.memory import apart, fresh

Pair = tuple[LowRank, float]
"""A low-rank change and its weight."""
Halves = tuple[Tensor, Tensor]
"""``(down, up)`` as PEFT's layer has them: ``(rank, in, *kernel)`` and ``(out, rank, *ones)``."""


def make_halves(orders: Sequence[tuple[Tensor, Sequence[Pair]]]) -> list[Halves]:
    """For each layer's weight and the pairs beside it: their halves, in the weight's dtype and on its device.

    Those of one dtype on one device reach it by one copy, and lie in one piece of memory; still each is a tensor by
    itself, so that the libraries' ways of saving a model write each and no more.

    Raises:
        AdapterError: numbers, or weights multiplied into them, too large for the dtype.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, (weight, _) in enumerate(orders):
        kinds.setdefault((weight.device, weight.dtype), []).append(index)
    halves: dict[int, Halves] = {}
    for (device, dtype), indices in kinds.items():
        pieces = [piece for index in indices for piece in _pieces(orders[index][1], dtype)]
        ends = [() if orders[index][0].dim() == 2 else (1,) * (orders[index][0].dim() - 2) for index in indices]
        block = _join(pieces, dtype)
        _check_range((orders[index][1] for index in indices), block)
        if block.device != device:
            (block,) = move_all([block], device)
        views = iter(apart(block, [piece.shape for piece in pieces]))
        halves |= {
            index: (down, up.view(*up.shape, *ones)) for index, down, up, ones in zip(indices, views, views, ends)
        }
    return [halves[index] for index in range(len(orders))]


def _join(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Copies of the pieces one behind the other, where they are."""
    here = pieces[0].device
    if any(piece.device != here for piece in pieces):
        pieces = move_all(pieces, here)
    size = sum(piece.numel() for piece in pieces)
    block = fresh(size, dtype) if here.type == "cpu" else torch.empty(size, dtype=dtype, device=here)
    return torch.cat([piece.reshape(-1) for piece in pieces], out=block)


def _check_range(pairs: Iterable[Sequence[Pair]], block: Tensor) -> None:
    """Refuse numbers that became infinite in main memory; a device would be waited for, and is not asked.

    Nothing is looked at where nothing can: in a dtype of float32's range, and where single pairs had the dtype before.

    Raises:
        AdapterError: they did.
    """
    dtype = block.dtype
    if block.device.type != "cpu" or torch.finfo(dtype).max >= torch.finfo(torch.bfloat16).max:
        return
    changed = any(len(each) > 1 or any(t.dtype != dtype for t in each[0][0].tensors()) for each in pairs)
    if changed and not holds_numbers(block):
        raise AdapterError(
            f"the stack's numbers, its weights in them, are too large for {dtype}: "
            "load the model in bfloat16 or float32, or give the stack smaller weights"
        )


def _pieces(pairs: Sequence[Pair], dtype: torch.dtype) -> Halves:
    """The halves of pairs that ride as one, down and up."""
    if len(pairs) == 1:
        layer, _ = pairs[0]
        down = wide(layer.down) * layer.scale if _narrows(layer, dtype) and layer.scale != 1.0 else layer.down
        return _plain(down.detach()), _plain(layer.up.detach())
    downs = [(wide(layer.down) * (layer.scale * weight)).to(dtype) for layer, weight in pairs]
    return torch.cat(downs).detach(), torch.cat([layer.up.to(dtype) for layer, _ in pairs], dim=1).detach()


def _plain(tensor: Tensor) -> Tensor:
    """Wide enough to be joined: not every version of torch joins fp8."""
    return tensor if tensor.element_size() > 1 else tensor.float()


def unit_of(pairs: Sequence[Pair], dtype: torch.dtype) -> float | None:
    """What PEFT multiplies halves laid out in this dtype by, at weight 1; ``None``: the weights are in them already."""
    if len(pairs) > 1:
        return None
    layer, _ = pairs[0]
    return 1.0 if _narrows(layer, dtype) else layer.scale


def _narrows(layer: LowRank, dtype: torch.dtype) -> bool:
    """Whether numbers may leave the dtype's range unless the layer's scale is in them."""
    return max(layer.up.dtype.itemsize, layer.down.dtype.itemsize) > dtype.itemsize
