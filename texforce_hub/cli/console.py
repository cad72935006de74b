"""What every command prints with: results on stdout, everything else on stderr, nothing raw."""

import codecs
import io
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

_PLAIN = str.maketrans("█▏▎▍▌▋▊▉–—…×·→“”‘’", "########--~x.>\"\"''")  # one for one, so that tables keep their columns


def accept_any_text() -> None:
    """Let stdout and stderr take characters that their encoding lacks: like ones, else question marks, are written."""
    codecs.register_error("texforce_hub.plain", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="texforce_hub.plain")


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(character if character.isascii() else "?" for character in text), error.end


def printable(text: str) -> str:
    """The text with control characters and terminal escapes shown as ``\\x1b``, never sent to the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class _PrintableRecord(logging.LogRecord):
    """A log record whose message can be shown: names of files and of layers in it are a stranger's."""

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return printable(super().getMessage())


@contextmanager
def printable_logs() -> Iterator[None]:
    """Every record of every logger, and every warning, is printable, whatever handler writes it."""
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_PrintableRecord)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.setLogRecordFactory(before)


class _Loudness:
    """How much a command says: one for the process, set for each command while it runs."""

    quiet = False
    verbose = False


LOUDNESS = _Loudness()


@contextmanager
def loudness(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """How much is said: ``quiet`` prints paths and verdicts alone, ``verbose`` every detail."""
    before = LOUDNESS.quiet, LOUDNESS.verbose
    LOUDNESS.quiet, LOUDNESS.verbose = quiet, verbose
    logger = logging.getLogger("texforce_hub")
    level = logger.level
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        LOUDNESS.quiet, LOUDNESS.verbose = before
        logger.setLevel(level)


def say(text: str) -> None:
    """A line for the person at the terminal (stderr)."""
    typer.echo(printable(text), err=True)


def note(text: str) -> None:
    """Something worth knowing (stderr); not with --quiet."""
    if not LOUDNESS.quiet:
        say(f"note: {text}")


def put(text: str) -> None:
    """A line of the result (stdout)."""
    typer.echo(printable(text))


def put_detail(text: str) -> None:
    """A line of the result that a summary can do without (stdout): not with --quiet."""
    if not LOUDNESS.quiet:
        put(text)


def first_of(lines: Sequence[str], most: int = 20) -> list[str]:
    """The first lines, and one that says how many more there are; --json has them all."""
    more = len(lines) - most
    return [*lines[:most], *([f"… and {more} more; --json has them all"] if more > 0 else [])]


def put_json(value: Any) -> None:
    """The result as one JSON object (stdout); control characters leave as JSON escapes."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=True, default=str))
