"""``env:NAME[:WORKERS]`` and ``env:./file.py:function[:WORKERS]``: a reward in an environment of its own."""

from dataclasses import dataclass
from pathlib import Path

from texforce_hub.errors import RewardError
from texforce_hub.rewards.built_in import BUILT_IN
from texforce_hub.rewards.environment.requirements import Requirements, read_requirements
from texforce_hub.settings import suggest_name

_MOST_WORKERS = 64


@dataclass(frozen=True)
class EnvironmentRef:
    """A reward in an environment of its own.

    name: as it is reported, without the number of workers; path: its file; function: for Python to import it
    """

    name: str
    path: Path
    function: str
    workers: int = 1

    @classmethod
    def parse(cls, spec: str) -> "EnvironmentRef":
        """The reward that ``spec``, without a weight, names.

        Raises:
            RewardError: there is none of that name, or no such file, or an impossible number of workers.
        """
        first, *words = spec.removeprefix("env:").split(":")
        workers = int(words.pop()) if words and words[-1].isdigit() else 1
        if not 1 <= workers <= _MOST_WORKERS:
            raise RewardError(f"reward {spec!r}: {workers} workers; expected 1 to {_MOST_WORKERS}")
        if first.endswith(".py"):
            return cls._parse_file(spec, Path(first), words, workers)
        if words or f"env:{first}" not in BUILT_IN:
            known = [name for name in BUILT_IN if name.startswith("env:")]
            hint = suggest_name(f"env:{first}", known, otherwise="built in are")
            raise RewardError(f"no reward {spec!r}; {hint} (your own: env:./file.py:function)")
        path = Path(__file__).parents[1] / f"{first}.py"
        return cls(f"env:{first}", path, f"python:texforce_hub.rewards.{first}:{first}", workers)

    @classmethod
    def _parse_file(cls, spec: str, path: Path, words: list[str], workers: int) -> "EnvironmentRef":
        if len(words) != 1 or not words[0].isidentifier():
            raise RewardError(f"reward {spec!r}; expected env:./file.py:function")
        if not path.is_file():
            raise RewardError(f"reward {spec!r}: there is no file {path}")
        return cls(f"env:{path}:{words[0]}", path, f"python:{path.resolve()}:{words[0]}", workers)

    def requirements(self) -> Requirements:
        """What its file says that it needs.

        Raises:
            RewardError: it does not say so, or not so that it can be had.
        """
        return read_requirements(self.path)
