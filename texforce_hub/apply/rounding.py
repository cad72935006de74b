"""Numbers rounded to a narrower dtype, to the nearest or at random, and what a change loses by that."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from texforce_hub.adapter.tensors import wide
from texforce_hub.errors import MatchError

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Loss:
    """What rounding did to a change: the norm of the error and that of the change, of one parameter or of many."""

    error: float
    change: float

    @property
    def relative(self) -> float:
        """``‖(rounded − base) − change‖ / ‖change‖``; 0 for no change."""
        return self.error / self.change if self.change > 0 else 0.0


def total_loss(losses: Iterable[Loss]) -> Loss:
    """The loss of all parameters together."""
    of_parameters = list(losses)
    errors, changes = ([getattr(loss, side) for loss in of_parameters] for side in ("error", "change"))
    return Loss(math.hypot(*errors), math.hypot(*changes))


def check_finite(losses: Mapping[str, Loss]) -> None:
    """Refuse losses of sums that became infinite, as far as the rows tell by which they are measured.

    Raises:
        MatchError: names the first parameter.
    """
    for name, loss in losses.items():
        if not math.isfinite(loss.error):
            raise MatchError(
                f"{name}: base and stack together are too large for the weight's dtype: "
                "load the model in bfloat16 or float32, or give the stack smaller weights"
            )


def measure_loss(base: Tensor, rounded: Tensor, change: Tensor) -> Loss:
    """What is lost of ``change`` (wide) where ``rounded`` stands for ``base + change``; all of one shape."""
    error = (wide(rounded) - wide(base)).sub_(change)
    return Loss(float(torch.linalg.vector_norm(error)), float(torch.linalg.vector_norm(change)))


def seed_for(seed: int, name: str) -> int:
    """The seed of one parameter's draws: from the run's seed and the name, so that no order matters."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def round_to(values: Tensor, dtype: torch.dtype, seed: int | None = None) -> Tensor:
    """The values in ``dtype``: to the nearest, or with a seed stochastically."""
    if seed is None:
        return values.to(dtype)
    return round_stochastically(values, dtype, torch.Generator().manual_seed(seed))


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each value as one of its two neighbours in ``dtype``, the nearer the likelier: right on average.

    Draws come from a CPU generator, so that they are the same on every device. Neighbours are found by their bit
    patterns, which count up with the magnitude in every floating dtype.
    """
    nearest = values.to(dtype)
    here = wide(nearest)
    error = wide(values) - here
    bits = nearest.view(_BITS[dtype.itemsize])
    outward = torch.where((error > 0) == (bits >= 0), bits + 1, bits - 1)
    across = torch.where(error > 0, 1, torch.iinfo(bits.dtype).min + 1)  # from zero, of either sign
    neighbour = torch.where(here == 0, across, outward).to(bits.dtype)
    chance = error / (wide(neighbour.view(dtype)) - here)
    draw = torch.rand(values.shape, generator=generator).to(values.device)
    return torch.where(draw < chance, neighbour, bits).view(dtype)
