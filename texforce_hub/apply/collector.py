"""Python's garbage collector, kept waiting while many objects are made that stay."""

import gc
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def uncollected(action: Callable[[], Result]) -> Result:
    """What the action returns; the collector runs on afterwards, if it did before, whatever happens in between.

    A layer of PEFT's is ten modules, some 160 objects. As they are made the collector walks over all objects of the
    process again and again, which takes longer than making them, and finds nothing.

    A function, and no context manager: Python handles a signal after a call, at a function's beginning and at a jump
    back, so that between the action's end, whatever it is, and the collector's start none is. Between a ``with``
    statement and the inside of the manager's methods there are such points.
    """
    if not gc.isenabled():  # nothing to do: another thread may have it waiting, and will start it when that is done
        return action()
    try:
        gc.disable()
        return action()
    finally:
        gc.enable()
