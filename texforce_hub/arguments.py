"""What callers give, checked where it comes in: a pipeline's type, values, and the numbers in names.

A wrong value is one line with the way out; a mistake in a name is shown with a caret.
"""

import math
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from texforce_hub.errors import ConfigError, RefError

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)

T = TypeVar("T")


class Pipeline(Protocol):
    """What we ask of a pipeline: its components by name, each an attribute too, and that a call draws.

    ``diffusers``' pipelines are such, and so is whatever has ``text_encoder``, ``tokenizer``, ``unet`` or
    ``transformer``, ``vae`` and ``scheduler`` as they have.
    """

    @property
    def components(self) -> Mapping[str, Any]:
        """Models, tokenizers and the scheduler by their names."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """Draw: ``prompt`` or ``prompt_embeds``, ``num_inference_steps``, ``generator`` … in, ``.images`` out."""

    def __getattr__(self, name: str, /) -> Any:
        """A component, or a setting."""

    def __setattr__(self, name: str, value: Any, /) -> None:
        """Put another component in."""


def check_pipeline(pipe: Any) -> None:
    """Refuse what is no pipeline.

    Raises:
        ConfigError: it has no components, or cannot be called.
    """
    if not callable(pipe) or not isinstance(getattr(pipe, "components", None), Mapping):
        raise ConfigError(
            f"{_shown(pipe)} is no pipeline; give what load_pipeline('shapes') gives, or one of diffusers'"
        )


def check_path(path: Any, what: str = "path") -> Path:
    """The path that a text or a path is.

    Raises:
        ConfigError: it is neither, or empty.
    """
    if not isinstance(path, str | PathLike) or path == "" or isinstance(path, bytes):
        raise ConfigError(f"{what} {_shown(path)}; expected a path, as text or pathlib.Path")
    return Path(path)


def check_texts(texts: Any, what: str = "prompts") -> tuple[str, ...]:
    """The texts of a list of them.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(texts, str):
        raise ConfigError(f"{what} {texts!r:.60} is one text; give a list: [{texts!r:.60}]")
    if isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable):
        raise ConfigError(f"{what} {_shown(texts)}; expected a list of texts")
    known = tuple(texts)
    if bad := [text for text in known if not isinstance(text, str)]:
        raise ConfigError(f"{what} with {_shown(bad[0])} in it; expected a list of texts")
    return known


def check_kind(value: Any, kind: type[T], way_out: str) -> T:
    """The value, which is of this class.

    Raises:
        ConfigError: it is not; ``way_out`` is what to give instead.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{_shown(value)} is no {kind.__name__}; {way_out}")
    return value


def fail(text: str, position: int, problem: str) -> NoReturn:
    """Raise a RefError that shows ``text`` with a caret under the character at ``position``."""
    shown = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in text]
    indent = " " * len("".join(shown[:position]))
    raise RefError(f"{problem}\n  {''.join(shown)}\n  {indent}^")


def parse_number(text: str, start: int, end: int, what: str) -> float:
    """The finite number at ``text[start:end]``; ``what`` says in the error what was expected."""
    word = text[start:end]
    if not NUMBER.fullmatch(word):
        fail(text, start, f"{word!r} is not a number; expected {what}")
    value = float(word)
    if not math.isfinite(value):
        fail(text, start, f"{word!r} is too large a number; expected {what}")
    return value


def write_number(number: float) -> str:
    """The shortest text that :func:`parse_number` reads as this number."""
    return repr(number).removesuffix(".0")


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.40}"
