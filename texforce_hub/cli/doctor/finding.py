"""What is found, and what is made of an examination that fails itself."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

from texforce_hub.errors import TexForceHubError
from texforce_hub.reading import first_line

_UNFORESEEN = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, NameError,
    OSError, RuntimeError, SyntaxError, TexForceHubError, TypeError, ValueError,
)  # fmt: skip
"""All that broken libraries, files and settings raise: an interrupt is not among it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: ``state`` is ``ok``, ``note`` (works, but) or ``problem``, ``advice`` what to do then."""

    name: str
    state: str
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """Plain values for JSON."""
        return asdict(self)


def watch(name: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What an examination finds; one that raises is a problem itself, and those after it are still made."""
    try:
        yield from look()
    except _UNFORESEEN as error:
        text = f"could not be looked at: {type(error).__name__}: {first_line(error)}"
        yield Finding(name, "problem", text, f"set right what is named here, and run doctor again for {name}")
