"""The library's log while a run draws: each line once."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("texforce_hub")


@contextmanager
def saying_once() -> Iterator[None]:
    """Each line of the library's log once, though it concerns every column of a picture."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        before = len(said)
        said.add(record.getMessage())
        return len(said) > before

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
