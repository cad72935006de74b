"""A reward as a user names it."""

import math
from dataclasses import dataclass

from texforce_hub.arguments import NUMBER, fail, parse_number, write_number
from texforce_hub.errors import RefError


@dataclass(frozen=True, slots=True)
class RewardRef:
    """A reward as a user names it, and its weight in a sum: ``NAME[=WEIGHT]``."""

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.name or not math.isfinite(self.weight):
            raise RefError(f"reward {self.name!r} with weight {self.weight}; expected a name and a finite weight")

    @classmethod
    def parse(cls, text: str) -> "RewardRef":
        """The reward that ``text`` writes; a URL keeps its own ``=`` unless a number follows the last.

        Raises:
            RefError: no name, or a weight that is no number.
        """
        name, equals, number = text.rpartition("=")
        is_url = name.startswith(("http://", "https://"))
        if not equals or (is_url and not NUMBER.fullmatch(number)):
            name, equals = text, ""
        if not name:
            fail(text, 0, "no reward's name; expected e.g. alignment=0.5")
        if not equals:
            return cls(name)
        return cls(name, parse_number(text, len(name) + 1, len(text), "a weight, e.g. alignment=0.5"))

    def __str__(self) -> str:
        weight = write_number(self.weight)
        return self.name if weight == "1" and "=" not in self.name else f"{self.name}={weight}"
