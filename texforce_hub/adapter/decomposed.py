"""A weight split into direction and magnitude (DoRA)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import check_tensors, wide
from texforce_hub.errors import AdapterError


@dataclass(frozen=True, slots=True, eq=False)
class Decomposed:
    """A weight split into direction and magnitude (DoRA, arXiv 2402.09353); its change needs the base's weight.

    With ``v = base + inner.delta()``: the tuned weight is ``magnitude · v / ‖v‖``, and the layer's own
    change is ``weight · (that - base)``: at a weight other than 1 it is interpolated linearly.

    Shapes:
        magnitude: as many entries as there are norms, any shape
        axis ``"out"``: one norm per output row, over everything else (PEFT); ``"in"``: one norm per input
        column, over outputs and kernel (LyCORIS)
    """

    inner: LowRank | Hadamard | Kronecker
    magnitude: Tensor
    axis: Literal["out", "in"] = "out"
    weight: float = 1.0

    def __post_init__(self) -> None:
        expected = self.inner.shape[0 if self.axis == "out" else 1]
        if self.magnitude.numel() != expected:
            raise AdapterError(
                f"DoRA layer with {self.magnitude.numel()} magnitudes for a weight {self.inner.shape} normed along "
                f"'{self.axis}'; expected {expected}"
            )
        check_tensors("DoRA layer", {"magnitude": self.magnitude})

    @property
    def rank(self) -> int | None:
        """The rank of the inner change; the whole change is not low rank."""
        return self.inner.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes, ``(out, in, *kernel)``."""
        return self.inner.shape

    def delta(self, base: Tensor | None = None) -> Tensor:
        """The dense change ``(out, in, *kernel)`` of this ``base``, float32.

        Raises:
            AdapterError: no base weight was given, or one of another shape.
        """
        if base is None:
            raise AdapterError("a DoRA layer's change depends on the base's weight: give base= (--base)")
        if tuple(base.shape) != self.shape:
            raise AdapterError(f"DoRA layer for a weight {self.shape}, given a base weight {tuple(base.shape)}")
        base = wide(base).to(self.magnitude.device)
        tuned = base + self.inner.delta()
        over = tuple(d for d in range(tuned.dim()) if d != (0 if self.axis == "out" else 1))
        norms = tuned.pow(2).sum(over, keepdim=True).sqrt()
        return self.weight * (wide(self.magnitude).view(norms.shape) / norms * tuned - base)

    def scaled(self, weight: float) -> "Decomposed":
        """The same change times ``weight`` (linear interpolation of the weights)."""
        return replace(self, weight=self.weight * weight)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it is stored as, in the order of :meth:`map`."""
        yield from self.inner.tensors()
        yield self.magnitude

    def map(self, change: Callable[[Tensor], Tensor]) -> "Decomposed":
        """The same layer with every tensor passed through ``change``."""
        return replace(self, inner=self.inner.map(change), magnitude=change(self.magnitude))
