"""A change of low rank (LoRA)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from texforce_hub.adapter.tensors import check_tensors, show_shapes, wide_alike
from texforce_hub.errors import AdapterError


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A change ``scale · up @ down`` of one layer's weight (LoRA, arXiv 2106.09685).

    Shapes:
        down: ``(rank, in)``, or ``(rank, in, *kernel)`` for a convolution
        up: ``(out, rank)``

    Raises:
        AdapterError: the halves do not share a rank, or have other dimensions or dtypes.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        halves = {"down": self.down, "up": self.up}
        if self.up.dim() != 2 or self.down.dim() < 2 or self.up.shape[1] != self.down.shape[0]:
            raise AdapterError(
                f"low-rank layer with {show_shapes(halves)}; expected down (rank, in, …) and up (out, rank) of one rank"
            )
        check_tensors("low-rank layer", halves)

    @property
    def rank(self) -> int:
        """Number of rows of ``down``."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes, ``(out, in, *kernel)``."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002  # the kinds share one signature
        """The dense change ``(out, in, *kernel)``, float32 (float64 if the halves are)."""
        up, down = wide_alike(self.up, self.down)
        return (self.scale * (up @ down.flatten(1))).view(self.shape)

    def scaled(self, weight: float) -> "LowRank":
        """The same change times ``weight``."""
        return replace(self, scale=self.scale * weight)

    def of_some_rank(self) -> "LowRank":
        """The same change, of a rank of at least 1: one of rank 0 gets a pair of zeros, which most algebra needs."""
        if self.rank:
            return self
        down = self.down.new_zeros(1, *self.down.shape[1:])
        return replace(self, down=down, up=self.up.new_zeros(len(self.up), 1))

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it is stored as, in the order of :meth:`map`."""
        yield from (self.down, self.up)

    def map(self, change: Callable[[Tensor], Tensor]) -> "LowRank":
        """The same layer with every tensor passed through ``change`` (a move or a cast)."""
        return replace(self, down=change(self.down), up=change(self.up))
