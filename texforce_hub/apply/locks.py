"""One lock a model: stacks that several threads put on one model and take off it do so one after the other."""

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from texforce_hub.families.names import PARTS

Result = TypeVar("Result")

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_REGISTER = threading.Lock()


def alone_on(models: Iterable[nn.Module], action: Callable[[], Result]) -> Result:
    """What the action returns, run while no other thread changes one of these models, the parts of a pipeline.

    Several locks are taken in one order everywhere, so that no two threads wait for each other.
    """
    with _REGISTER:
        locks = {id(model): _LOCKS.setdefault(model, threading.RLock()) for model in models}
    spare = [threading.RLock() for _ in PARTS]
    first, second, third, fourth, fifth = [*(locks[key] for key in sorted(locks)), *spare][: len(PARTS)]
    with first, second, third, fourth, fifth:  # no loop: an interrupt would come between taking and noting a lock
        return action()
