"""A Kronecker product of two small matrices (LoKr)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import check_tensors, show_shapes, wide_alike
from texforce_hub.errors import AdapterError


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """A Kronecker product ``scale · left ⊗ (up @ down)`` or ``scale · left ⊗ right`` (LoKr, arXiv 2212.10650).

    Shapes:
        left: ``(p, q)``; either right: ``(out/p, in/q, *kernel)``, or up: ``(out/p, rank)`` and
        down: ``(rank, in/q, *kernel)``
    """

    left: Tensor
    right: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        parts = {"left": self.left, "right": self.right, "up": self.up, "down": self.down}
        full = self.right is not None and self.up is None and self.down is None and self.right.dim() >= 2
        factored = (
            self.right is None
            and self.up is not None
            and self.down is not None
            and self.up.dim() == 2
            and self.up.shape[1] == self.down.shape[0]
        )
        if self.left.dim() != 2 or not (full or factored):
            raise AdapterError(
                f"Kronecker layer with {show_shapes(parts)}; expected left (p, q) and a full right or an up and a down"
            )
        check_tensors("Kronecker layer", parts)

    @property
    def rank(self) -> int | None:
        """An upper bound of the rank when the right side is factored, ``min(p, q) · rank``; else ``None``."""
        return None if self.down is None else min(self.left.shape) * self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes, ``(out, in, *kernel)``."""
        right = self.right.shape if self.right is not None else self._factored_shape()
        return (self.left.shape[0] * right[0], self.left.shape[1] * right[1], *right[2:])

    def _factored_shape(self) -> tuple[int, ...]:
        assert self.up is not None
        assert self.down is not None
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The dense change ``(out, in, *kernel)``, float32 (float64 if the factors are)."""
        if self.right is not None:
            left, right = wide_alike(self.left, self.right)
        else:
            assert self.up is not None
            assert self.down is not None
            left, up, down = wide_alike(self.left, self.up, self.down.flatten(1))
            right = (up @ down).view(self._factored_shape())
        left = left.view(*left.shape, *[1] * (right.dim() - 2))
        return self.scale * torch.kron(left.contiguous(), right.contiguous())

    def low_rank(self) -> LowRank | None:
        """The same change as one low-rank pair, exactly, or ``None`` where the right side is stored in full.

        ``left ⊗ (up @ down) = (left ⊗ up) (1 ⊗ down)``; the narrower side of ``left`` goes where it makes
        the rank ``min(p, q) · rank``.
        """
        if self.up is None or self.down is None:
            return None
        left, up, down = wide_alike(self.left, self.up, self.down.flatten(2) if self.down.dim() > 2 else self.down)
        rows, columns = left.shape
        kernel = self.down.shape[2:]
        identity = torch.eye(min(rows, columns), dtype=left.dtype, device=left.device)
        left_up, left_down = (left, identity) if columns <= rows else (identity, left)
        wide_up = torch.kron(left_up.contiguous(), up.contiguous())
        if kernel:
            flat = torch.kron(left_down[:, :, None].contiguous(), down.contiguous())
            wide_down = flat.reshape(-1, self.shape[1], *kernel)
        else:
            wide_down = torch.kron(left_down.contiguous(), down.contiguous())
        return LowRank(wide_down, wide_up, self.scale)

    def scaled(self, weight: float) -> "Kronecker":
        """The same change times ``weight``."""
        return replace(self, scale=self.scale * weight)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it is stored as, in the order of :meth:`map`."""
        yield self.left
        yield from (tensor for tensor in (self.right, self.up, self.down) if tensor is not None)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Kronecker":
        """The same layer with every tensor passed through ``change``."""
        changed = {
            name: None if tensor is None else change(tensor)
            for name, tensor in (("right", self.right), ("up", self.up), ("down", self.down))
        }
        return Kronecker(change(self.left), scale=self.scale, **changed)
