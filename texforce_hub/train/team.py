"""Several processes that train one adapter, started by ``accelerate launch`` or ``torchrun``.

Each draws and judges its share of a step's prompts; the gradients are summed, so that all make the same update. What
they exchange is small – a LoRA's gradient and some numbers a step – and goes over gloo from main memory, whatever the
device: where a process dies, gloo tells the others, and nobody waits for it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from texforce_hub.errors import ConfigError, TrainingError
from texforce_hub.reading import first_line

T = TypeVar("T")


class LostProcessError(TrainingError):
    """Another process of the run has ended, or cannot be reached."""


class OtherProcessError(TrainingError):
    """Something went wrong in another process of the run; the message is that process's."""


class OtherOutOfMemoryError(torch.OutOfMemoryError):
    """Another process of the run has no memory left for the step."""


@dataclass(frozen=True, eq=False)
class Team:
    """The processes of a run, and which of them this is. All call the same methods in the same order."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # what the launcher has for this process
    group: Any = None  # of torch.distributed

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's share of ``count`` things in a row; no two shares differ by more than one."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks."""
        return [value] if self.size == 1 else self._exchange(value)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor the sum over all processes: the same bits in every one of them."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten().float().cpu() for tensor in tensors])
        self._exchange(None)  # whoever failed says so here
        with _losing():
            distributed.all_reduce(flat, group=self.group)
        for tensor, total in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def lead(self, work: Callable[[], T]) -> T:
        """What the first process makes, in all of them."""
        if self.size == 1:
            return work()
        made: list[Any] = [work() if self.leads else None]
        self._exchange(None)
        with _losing():
            distributed.broadcast_object_list(made, src=0, group=self.group)
        result: T = made[0]
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        """What goes wrong in here in one process goes wrong in all, at their next exchange.

        Raises:
            OtherProcessError, OtherOutOfMemoryError: it went wrong in another.
            LostProcessError: another has ended without a word.
        """
        try:
            yield
        except (LostProcessError, OtherProcessError, OtherOutOfMemoryError):
            raise
        except Exception as error:
            if self.size > 1:
                self._exchange(None, failure=error)
            raise

    def _exchange(self, value: T, failure: Exception | None = None) -> list[T]:
        full = isinstance(failure, torch.OutOfMemoryError)
        mine = None if failure is None else f"process {self.rank}: {first_line(failure)}"
        everybody: list[Any] = [None] * self.size
        with _losing():
            distributed.all_gather_object(everybody, (mine, full, value), group=self.group)
        failures = [(words, full) for words, full, _ in everybody if words is not None]
        if failures and failure is None:
            words, full = failures[0]
            raise OtherOutOfMemoryError(words) if full else OtherProcessError(words)
        return [value for _, _, value in everybody]


ALONE = Team()


@contextmanager
def joined() -> Iterator[Team]:
    """The processes that a launcher started as one; without a launcher, this one alone.

    Raises:
        ConfigError: they cannot reach each other.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield ALONE
        return
    from accelerate.state import PartialState

    try:
        state = PartialState(cpu=not torch.cuda.is_available(), backend="gloo")
        group = distributed.new_group(backend="gloo")  # of our own: a caller's exchanges do not come between
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the {os.environ['WORLD_SIZE']} processes of this run cannot reach each other: {first_line(error)}; "
            "start them with accelerate launch or torchrun"
        ) from error
    yield Team(state.process_index, state.num_processes, state.device, group)


@contextmanager
def _losing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(f"another process of the run has ended or is silent ({first_line(error)})") from error
