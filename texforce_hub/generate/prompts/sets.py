"""Where prompts come from: a file, or the shapes world's own grammar.

A training step's prompts depend on the run's seed and the step's number alone, so a resumed run asks what
the uninterrupted one would have asked.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from texforce_hub.errors import PromptError
from texforce_hub.generate.prompts.emphasis import is_weighted
from texforce_hub.generate.prompts.tags import refuse_tags
from texforce_hub.shapes.grammar import KINDS, caption, sample_prompts, sample_scene

_KINDS = {"single": 0.3, "place": 0.7}  # of noisy prompts: with two noisy words a pair is too much a matter of chance
_WORDS = {
    "colour": frozenset({"colour"}),
    "shape": frozenset({"shape"}),
    "both": frozenset({"colour", "shape"}),
    "canonical": frozenset[str](),
}
_HELD_OUT = 96  # prompts of an evaluation that names no file


class PromptSet(Protocol):
    """Something that prompts are drawn from."""

    def draw(self, step: int, count: int, seed: int) -> list[str]:
        """The prompts of a training step; all different if there are enough."""

    def sample(self, count: int) -> list[str]:
        """A fixed selection for validation, at most ``count``."""


@dataclass(frozen=True)
class ListedPrompts:
    """The prompts of a file; every pass through them is shuffled anew."""

    prompts: tuple[str, ...]

    def draw(self, step: int, count: int, seed: int) -> list[str]:
        """The next ``count`` prompts of the endless shuffled sequence."""
        first = step * count
        return [self._at(i, seed) for i in range(first, first + count)]

    def sample(self, count: int) -> list[str]:
        """Evenly spread over the file."""
        return list(self.prompts[:: max(1, len(self.prompts) // count)][:count])

    def _at(self, index: int, seed: int) -> str:
        turn, position = divmod(index, len(self.prompts))
        return random.Random(f"{seed} {turn}").sample(self.prompts, len(self.prompts))[position]


@dataclass(frozen=True)
class ShapesPrompts:
    """Seen combinations of the shapes world, in noisy words, a share of them in the canonical ones."""

    noisy: frozenset[str]
    canonical: float

    def draw(self, step: int, count: int, seed: int) -> list[str]:
        """``count`` different prompts."""
        return self._prompts(random.Random(f"train {seed} {step}"), count)

    def sample(self, count: int) -> list[str]:
        """``count`` different prompts, the same for every seed."""
        return self._prompts(random.Random("validation"), count)

    def _prompts(self, rng: random.Random, count: int) -> list[str]:
        captions: dict[str, None] = {}
        canonical = [i < round(self.canonical * count) for i in range(count)]
        if count < 8:  # a share of a few prompts is a matter of chance
            canonical = [rng.random() < self.canonical for _ in range(count)]
        for known in canonical:
            size = len(captions)
            while len(captions) == size:
                scene = sample_scene(rng, kinds=KINDS if known else _KINDS, split="train")
                captions.setdefault(caption(scene, noisy=frozenset() if known else self.noisy))
        return list(captions)


def load_prompts(source: str | None, *, base: str, canonical: float) -> PromptSet:
    """The prompt set that ``source`` names: a file, ``shapes:WORDS``, or ``None`` for the base's own.

    Raises:
        PromptError: a base without prompts of its own, an unknown selection, or a file that cannot be used.
    """
    if source is None and base != "shapes":
        raise PromptError(f"the base {base!r} brings no prompts of its own; give a file with --prompts FILE")
    if source is None:
        source = "shapes:colour"
    if source.startswith("shapes:"):
        return ShapesPrompts(_find_words(source), canonical)
    return ListedPrompts(_read_plain(source))


def held_out_prompts(source: str) -> list[str]:
    """The prompts to evaluate on that ``source`` names: a file's, or held-out ones of ``shapes:WORDS``.

    Raises:
        PromptError: an unknown selection, or a file that cannot be used.
    """
    if source.startswith("shapes:"):
        return sample_prompts(_HELD_OUT, 0, split="test", noisy=_find_words(source))
    return list(_read_plain(source))


def _find_words(source: str) -> frozenset[str]:
    words = source.removeprefix("shapes:")
    if words not in _WORDS:
        raise PromptError(
            f"no prompts {source!r}; there are {', '.join(f'shapes:{name}' for name in _WORDS)}, or a file"
        )
    return _WORDS[words]


def _read_plain(source: str) -> tuple[str, ...]:
    prompts = read_prompts(source)
    refuse_markup(prompts)
    return prompts


def refuse_markup(prompts: Iterable[str]) -> None:
    """Refuse prompts with tags or weights where only words are read.

    Raises:
        PromptError: names the prompt.
    """
    for prompt in prompts:
        refuse_tags(prompt, "tags are for apply; give the adapter as an option")
        if is_weighted(prompt):
            raise PromptError(f"{prompt!r} holds weights, which only apply reads; write the words alone")


def gather_prompts(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The prompts of a command line, then those of a file.

    Raises:
        PromptError: there is none, or the file cannot be read or holds none.
    """
    prompts = (*given, *(read_prompts(file) if file is not None else ()))
    if not prompts:
        raise PromptError("no prompt; give --prompt TEXT or --prompts FILE")
    return prompts


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines and lines that begin with ``#`` are left out.

    Raises:
        PromptError: the file cannot be read, or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read prompts from {path}: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not prompts:
        raise PromptError(f"{path} holds no prompt; expected one a line")
    return prompts
