"""What a damage is, and the table of all of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.damage.files import Random, Tensors, write_twin
from texforce_hub.errors import TexForceHubError


@dataclass(frozen=True)
class Damage:
    """What is done to a file, and the class and a phrase (a regular expression) of the error that follows.

    ``error`` is ``None`` where the file still reads exactly, and the phrase is of a problem that ``inspect`` names.
    """

    name: str
    damage: Callable[[Path, Random], None]
    error: type[TexForceHubError] | None
    phrase: str
    suffix: str = ".safetensors"
    while_read: Callable[[], AbstractContextManager[object]] = nullcontext
    twin: Callable[[Path, Random, str], Tensors] = write_twin


DAMAGES: dict[str, Damage] = {}


def damages(
    name: str,
    error: type[TexForceHubError] | None,
    phrase: str,
    suffix: str = ".safetensors",
    twin: Callable[[Path, Random, str], Tensors] = write_twin,
) -> Callable[..., Any]:
    """Register a damage of a written file."""

    def register(damage: Callable[[Path, Random], None]) -> Callable[[Path, Random], None]:
        assert name not in DAMAGES
        DAMAGES[name] = Damage(name, damage, error, phrase, suffix, twin=twin)
        return damage

    return register
