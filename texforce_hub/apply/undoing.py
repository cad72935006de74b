"""Steps of an undoing: each is done, whatever becomes of the others."""

from collections.abc import Callable, Iterable

_TRIES = 8
"""How many interrupts one undoing stands: more come only from somebody who wants to be rid of the process."""


def do_all(steps: Iterable[Callable[[], None]]) -> list[BaseException]:
    """Run every step; an error ends its step only, an interrupt has its step run again.

    Args:
        steps: each may be run twice, or after it was cut off anywhere.

    Returns:
        what was raised, in order; empty if all is done.
    """
    raised: list[BaseException] = []
    for step in steps:
        for _ in range(_TRIES):
            try:
                step()
            except Exception as error:  # noqa: BLE001  # raised again when all is done
                raised.append(error)
            except BaseException as interrupt:  # noqa: BLE001  # likewise
                raised.append(interrupt)
                continue
            break
    return raised


def insist(undoing: Callable[[], list[BaseException]]) -> list[BaseException]:
    """Run an undoing made of :func:`do_all` to its end, again from the start if it was cut off between two steps."""
    interrupts: list[BaseException] = []
    for _ in range(_TRIES):
        try:
            return [*interrupts, *undoing()]
        except BaseException as interrupt:  # noqa: BLE001  # likewise
            interrupts.append(interrupt)
    return interrupts
