"""Two low-rank changes multiplied elementwise (LoHa)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import check_tensors, show_shapes, wide_alike
from texforce_hub.errors import AdapterError


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard:
    """Two low-rank changes multiplied elementwise (LoHa, arXiv 2108.06098).

    The change is ``scale · (up1 @ down1) ∘ (up2 @ down2)``.

    Shapes:
        up1, up2: ``(out, r1)``, ``(out, r2)``    down1, down2: ``(r1, in, *kernel)``, ``(r2, in, *kernel)``
    """

    up1: Tensor
    down1: Tensor
    up2: Tensor
    down2: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        halves = {"up1": self.up1, "down1": self.down1, "up2": self.up2, "down2": self.down2}
        fits = (
            self.up1.dim() == self.up2.dim() == 2
            and self.up1.shape[0] == self.up2.shape[0]
            and self.up1.shape[1] == self.down1.shape[0]
            and self.up2.shape[1] == self.down2.shape[0]
            and self.down1.shape[1:] == self.down2.shape[1:]
        )
        if not fits:
            raise AdapterError(f"Hadamard layer with {show_shapes(halves)}; the two products must have one shape")
        check_tensors("Hadamard layer", halves)

    @property
    def rank(self) -> int:
        """An upper bound of the product's rank, ``r1 · r2``."""
        return self.up1.shape[1] * self.up2.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes, ``(out, in, *kernel)``."""
        return (self.up1.shape[0], *self.down1.shape[1:])

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The dense change ``(out, in, *kernel)``, float32 (float64 if the halves are)."""
        up1, down1, up2, down2 = wide_alike(self.up1, self.down1, self.up2, self.down2)
        first, second = up1 @ down1.flatten(1), up2 @ down2.flatten(1)
        return (self.scale * first * second).view(self.shape)

    def low_rank(self) -> LowRank:
        """The same change as one low-rank pair of rank ``r1 · r2``, exactly (a face-splitting product)."""
        up1, down1, up2, down2 = wide_alike(self.up1, self.down1.flatten(1), self.up2, self.down2.flatten(1))
        up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
        down = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
        return LowRank(down.view(-1, *self.shape[1:]), up, self.scale)

    def scaled(self, weight: float) -> "Hadamard":
        """The same change times ``weight``."""
        return replace(self, scale=self.scale * weight)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it is stored as, in the order of :meth:`map`."""
        yield from (self.up1, self.down1, self.up2, self.down2)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Hadamard":
        """The same layer with every tensor passed through ``change``."""
        return Hadamard(change(self.up1), change(self.down1), change(self.up2), change(self.down2), self.scale)
