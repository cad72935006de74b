"""Whether pickles are fetched from the Hub: only by those who said so, for a call or for a command."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from texforce_hub.errors import FileError

_permitted = ContextVar("pickles from the Hub", default=False)


@contextmanager
def permitting_pickles(*, allow: bool) -> Iterator[None]:
    """While it lasts, pickles from the Hub are read, if ``allow``: their tensors, and nothing in them is run."""
    token = _permitted.set(allow or _permitted.get())
    try:
        yield
    finally:
        _permitted.reset(token)


def are_pickles_permitted() -> bool:
    """Whether pickles from the Hub may be fetched and read here."""
    return _permitted.get()


def refuse_pickles(typed: str, names: Sequence[str]) -> None:
    """Refuse to fetch files that would not be read.

    Raises:
        FileError: one of these names is not a safetensors file's, and pickles are not permitted.
    """
    pickle = next((name for name in names if not name.lower().endswith(".safetensors")), None)
    if pickle is not None and not are_pickles_permitted():
        raise FileError(
            f"{typed}: {pickle} is a pickle, which is not read unasked and was not fetched; --allow-pickle "
            "(allow_pickle=True in Python) reads its tensors and runs nothing in it"
        )
