"""One lock a model: stacks that several threads put on one model and take off it do so one after the other."""

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn

Result = TypeVar("Result")

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_REGISTER = threading.Lock()


def alone_on(models: Iterable[nn.Module], action: Callable[[], Result]) -> Result:
    """What the action returns, run while no other thread changes one of these models.

    Several locks are taken in one order everywhere, so that no two threads wait for each other.
    """
    with _REGISTER:
        locks = {id(model): _LOCKS.setdefault(model, threading.RLock()) for model in models}
    return _holding([locks[key] for key in sorted(locks)], action)


def _holding(locks: list[threading.RLock], action: Callable[[], Result]) -> Result:
    if not locks:
        return action()
    with locks[0]:  # a with statement: an interrupt cannot come between taking a lock and noting that it is held
        return _holding(locks[1:], action)
