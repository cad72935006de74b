"""Processes that are killed at a chosen call that touches files: the same moment each time, on any machine."""

import itertools
import os
import sys
from collections.abc import Callable
from io import IOBase
from types import FrameType
from typing import Any


def _touches_files(call: Any) -> bool:
    return getattr(call, "__module__", None) in ("posix", "_io") or isinstance(getattr(call, "__self__", None), IOBase)


def die_at(moment: int) -> None:
    """End this process, as SIGKILL would, ahead of its n-th call that touches files; nothing is flushed."""
    calls = itertools.count()

    def count(_frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and _touches_files(argument) and next(calls) == moment:
            os._exit(9)

    sys.setprofile(count)


def count_calls(work: Callable[[], object]) -> int:
    """How many calls of this work touch files."""
    calls = 0

    def count(_frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "c_call" and _touches_files(argument)

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def in_child(work: Callable[[], object]) -> int:
    """The id of a process forked off to do this; whatever goes wrong there, it never comes back here."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def ends_with(child: int) -> int:
    """The exit code of a process; 9 of one that was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
