"""On what terms rewards may be used, as far as it is known."""

from collections.abc import Sequence
from pathlib import Path

from texforce_hub.errors import RewardError
from texforce_hub.rewards.built_in import BUILT_IN
from texforce_hub.rewards.environment.spec import EnvironmentRef
from texforce_hub.rewards.ref import RewardRef


def describe_licences(specs: Sequence[str]) -> str:
    """``NAME: licence`` of each reward that has one, with semicolons between; files by their last component.

    Example:
        >>> describe_licences(["pickscore=0.5", "brightness", "env:hands"])
        'pickscore: MIT; env:hands: Apache-2.0 (MediaPipe and the models in its wheel)'
    """
    known = {name: licence for name, licence in map(_find_licence, specs) if licence}
    return "; ".join(f"{name}: {licence}" for name, licence in known.items())


def _find_licence(spec: str) -> tuple[str, str | None]:
    name = RewardRef.parse(spec).name
    if name.startswith("env:"):
        return _read_licence(name)
    short = name.partition(":")[0]
    return short, BUILT_IN[short].licence if short in BUILT_IN else None


def _read_licence(name: str) -> tuple[str, str | None]:
    """What a reward's file says; a file that is no longer there says nothing."""
    try:
        ref = EnvironmentRef.parse(name)
        licence = ref.requirements().licence
    except RewardError:
        return name, None
    is_file = ref.name.count(":") == 2
    return f"env:{Path(ref.path).name}:{ref.name.rpartition(':')[2]}" if is_file else ref.name, licence
