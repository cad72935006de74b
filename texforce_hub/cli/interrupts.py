"""Signals that end a command unwind it as Ctrl-C does: what is half-written is removed, what is put on is taken off."""

import signal
import threading
from types import FrameType

_received: list[int] = []


def unwind_on_signals() -> None:
    """From now on SIGTERM and SIGHUP end this process as Ctrl-C does.

    A signal that the parent had ignored (``nohup``) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt


def interrupted_code() -> int:
    """The exit code of a command that was interrupted: 128 and the signal's number; 130 of Ctrl-C."""
    return 128 + (_received[-1] if _received else signal.SIGINT)
