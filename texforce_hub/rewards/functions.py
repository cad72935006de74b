"""Somebody's scoring function: imported from a module or a file, and watched while it is called; without torch."""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from texforce_hub.errors import RewardError
from texforce_hub.reading import first_line
from texforce_hub.rewards.wire import Pixels

Score = Callable[[Any, Sequence[str]], Any]
"""Pictures ``(b, 3, h, w)`` and their prompts in, ``(b,)`` out; somebody else's code may return anything."""
ArrayScore = Callable[[Pixels, Sequence[str]], Pixels]
"""The same with arrays of numpy, checked."""


def import_function(spec: str) -> Score:
    """The function that ``python:module:function`` or ``python:./file.py:function`` names.

    Raises:
        RewardError: it cannot be imported, or is no function.
    """
    _, module, function = [*spec.split(":"), "", ""][:3]
    if not module or not function or spec.count(":") != 2:
        raise RewardError(f"reward {spec!r}; expected python:module:function or python:./file.py:function")
    try:
        loaded = _load_file(spec, Path(module)) if module.endswith(".py") else import_module(module)
        imported = getattr(loaded, function)
    except ImportError as error:
        raise RewardError(f"reward {spec!r}: cannot import {module!r}: {error}") from error
    except AttributeError as error:
        raise RewardError(f"reward {spec!r}: module {module!r} has no {function!r}") from error
    return _check_callable(spec, function, imported)


def _load_file(spec: str, path: Path) -> ModuleType:
    """The module in a file, whatever folder it lies in."""
    if not path.is_file():
        raise RewardError(f"reward {spec!r}: there is no file {path}")
    source = spec_from_file_location(f"texforce_hub_reward_{path.stem}", path)
    if source is None or source.loader is None:
        raise RewardError(f"reward {spec!r}: Python cannot load {path}")
    module = module_from_spec(source)
    try:
        source.loader.exec_module(module)
    except (ImportError, AttributeError):
        raise
    except Exception as error:  # somebody else's code may raise anything
        raise RewardError(f"reward {spec!r}: {path} raised {type(error).__name__}: {first_line(error)}") from error
    return module


def _check_callable(spec: str, name: str, imported: Any) -> Score:
    if not callable(imported):
        raise RewardError(f"reward {spec!r}: {name!r} is a {type(imported).__name__}, not a function")
    score: Score = imported
    return score


def call_function(name: str, function: Score, images: Any, prompts: Sequence[str]) -> Any:
    """What the function returns.

    Raises:
        RewardError: it raised something; the message names the prompt.
    """
    try:
        return function(images, prompts)
    except RewardError:
        raise  # it says all already
    except Exception as error:
        culprit = _find_culprit(function, images, prompts)
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__} for the prompt {culprit!r}: {first_line(error)}"
        ) from error


def _find_culprit(function: Score, images: Any, prompts: Sequence[str]) -> str:
    """The first prompt that fails alone; the batch's first if none does."""
    for image, prompt in zip(images, prompts, strict=True):
        try:
            function(image[None], [prompt])
        except Exception:  # noqa: BLE001  # which of them it was is all we ask; the error itself is on its way
            return prompt
    return prompts[0]


def check_function(name: str, function: Score) -> ArrayScore:
    """A function of arrays whose results are checked at every call, as :class:`Reward` checks tensors.

    Raises:
        RewardError: on a call, if the function raises or gives another shape, or a value that is not finite.
    """

    def score(images: Pixels, prompts: Sequence[str]) -> Pixels:
        result = call_function(name, function, images, prompts)
        try:
            numbers = np.asarray(result, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {name!r} gave a {type(result).__name__}; expected numbers") from error
        if numbers.shape != (len(prompts),):
            raise RewardError(
                f"reward {name!r} gave shape {numbers.shape} for {len(prompts)} pictures, "
                f"the first of {prompts[0]!r}; expected ({len(prompts)},)"
            )
        for number, prompt in zip(numbers, prompts, strict=True):
            if not np.isfinite(number):
                raise RewardError(f"reward {name!r} gave {number} for the prompt {prompt!r}")
        return numbers

    return score
