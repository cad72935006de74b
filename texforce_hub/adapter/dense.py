"""Changes that are stored in full: of a matrix or convolution, of a bias or a norm."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from texforce_hub.adapter.tensors import check_tensors, wide
from texforce_hub.errors import AdapterError


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A change stored entry by entry: ``scale · value``."""

    value: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> None:
        """What is stored in full has no rank of its own."""
        return

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter it changes."""
        return tuple(self.value.shape)

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002  # the kinds share one signature
        """The change in the parameter's shape, float32 (float64 if the value is)."""
        return self.scale * wide(self.value)

    def scaled(self, weight: float) -> Self:
        """The same change times ``weight``."""
        return replace(self, scale=self.scale * weight)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it is stored as, in the order of :meth:`map`."""
        yield self.value

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same layer with its tensor passed through ``change`` (a move or a cast)."""
        return replace(self, value=change(self.value))


@dataclass(frozen=True, slots=True, eq=False)
class Dense(Stored):
    """A change of a matrix or a convolution, stored in full.

    Shapes:
        value: ``(out, in, *kernel)``

    Raises:
        AdapterError: a value of fewer dimensions, or of no floating dtype.
    """

    def __post_init__(self) -> None:
        if self.value.dim() < 2:
            raise AdapterError(f"dense layer with value {tuple(self.value.shape)}; expected at least (out, in)")
        check_tensors("dense layer", {"value": self.value})


@dataclass(frozen=True, slots=True, eq=False)
class Vector(Stored):
    """A change of a one-dimensional parameter, a bias or a norm's weight.

    Shapes:
        value: ``(n,)``

    Raises:
        AdapterError: a value of other dimensions, or of no floating dtype.
    """

    def __post_init__(self) -> None:
        if self.value.dim() != 1:
            raise AdapterError(f"vector layer with value {tuple(self.value.shape)}; expected (n,)")
        check_tensors("vector layer", {"value": self.value})
