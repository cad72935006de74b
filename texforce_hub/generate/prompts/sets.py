"""Which prompts a run draws, validates on and leaves alone: of a list, or the shapes world's own grammar.

A training step's prompts depend on the run's seed and the step's number alone, so a resumed run asks what
the uninterrupted one would have asked.
"""

import hashlib
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from texforce_hub.errors import PromptError
from texforce_hub.generate.prompts.emphasis import is_weighted
from texforce_hub.generate.prompts.sources import PromptList, read_source
from texforce_hub.generate.prompts.tags import refuse_tags
from texforce_hub.shapes import SHAPES
from texforce_hub.shapes.grammar import KINDS, caption, sample_prompts, sample_scene

_LOG = logging.getLogger("texforce_hub")

_KINDS = {"single": 0.3, "place": 0.7}  # of noisy prompts: with two noisy words a pair is too much a matter of chance
_WORDS = {
    "colour": frozenset({"colour"}),
    "shape": frozenset({"shape"}),
    "both": frozenset({"colour", "shape"}),
    "canonical": frozenset[str](),
}
_TRIES = 500  # for one more prompt that is not there yet; then there are as many as the world has
_SPLIT_FROM = 10  # prompts of a file from which on some are held out
_HELD_OUT = 96  # prompts of an evaluation that names no file


class PromptSet(Protocol):
    """Something that prompts are drawn from."""

    def draw(self, step: int, count: int, seed: int) -> list[str]:
        """The prompts of a training step; all different if there are enough."""

    def sample(self, count: int) -> list[str]:
        """A fixed selection for validation, at most ``count``, that :meth:`draw` never gives if that can be."""

    def anchors(self, step: int, count: int, seed: int) -> list[str]:
        """Prompts whose meaning is to stay as it is, for a training step."""

    def texts(self) -> list[str]:
        """All prompts, where they can be listed."""

    @property
    def facts(self) -> dict[str, str]:
        """What a run's record says of them."""


@dataclass(frozen=True)
class ListedPrompts:
    """The prompts of a file, one in ten of them held out; every pass through the others is shuffled anew."""

    prompts: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    anchored: tuple[str, ...] = ()
    source: PromptList | None = None

    @property
    def facts(self) -> dict[str, str]:
        """How many prompts there are, and their licence."""
        count = str(len(self.prompts) + len(self.held_out))
        said = self.source.license if self.source is not None else ""
        return {"prompts_count": count} | ({"prompts_license": said} if said else {})

    def draw(self, step: int, count: int, seed: int) -> list[str]:
        """The next ``count`` prompts of the endless shuffled sequence."""
        return _take_shuffled(self.prompts, step, count, seed)

    def sample(self, count: int) -> list[str]:
        """Evenly spread over what is held out; over the file if it is too short for that."""
        prompts = self.held_out or self.prompts
        return list(prompts[:: max(1, len(prompts) // count)][:count])

    def anchors(self, step: int, count: int, seed: int) -> list[str]:
        """The next of the anchors' own sequence; without any, of the prompts'."""
        prompts = self.anchored or self.prompts
        return _take_shuffled(prompts, step, min(count, len(prompts)), seed)

    def texts(self) -> list[str]:
        """All prompts."""
        return [*self.prompts, *self.held_out, *self.anchored]


def _take_shuffled(prompts: Sequence[str], step: int, count: int, seed: int) -> list[str]:
    first, taken = step * count, []
    for i in range(first, first + count):
        turn, index = divmod(i, len(prompts))
        taken.append(random.Random(f"{seed} {turn}").sample(prompts, len(prompts))[index])
    return taken


@dataclass(frozen=True)
class ShapesPrompts:
    """Seen combinations of the shapes world, in noisy words, a share of them in the canonical ones."""

    noisy: frozenset[str]
    canonical: float
    anchored: tuple[str, ...] = ()

    def draw(self, step: int, count: int, seed: int) -> list[str]:
        """``count`` different prompts."""
        return self._prompts(random.Random(f"train {seed} {step}"), count, self.canonical)

    def sample(self, count: int) -> list[str]:
        """``count`` different prompts, the same for every seed: half in noisy words, half in those that are known."""
        return self._prompts(random.Random("validation"), count, 0.5, held_out=True)

    def anchors(self, step: int, count: int, seed: int) -> list[str]:
        """Prompts in known words alone, and the empty one."""
        if self.anchored:
            return _take_shuffled(self.anchored, step, min(count, len(self.anchored)), seed)
        return ["", *self._prompts(random.Random(f"anchors {seed} {step}"), count - 1, 1.0)]

    @property
    def facts(self) -> dict[str, str]:
        """The licence of sentences that the package itself makes."""
        return {"prompts_license": "apache-2.0"}

    def texts(self) -> list[str]:
        """The anchors; the world's own sentences are all short."""
        return list(self.anchored)

    def _prompts(self, rng: random.Random, count: int, canonical: float, *, held_out: bool = False) -> list[str]:
        prompts: dict[str, None] = {}
        known = [i < round(canonical * count) for i in range(count)]
        if count < 8:  # a share of a few prompts is a matter of chance
            known = [rng.random() < canonical for _ in range(count)]
        for is_known in known:
            size = len(prompts)
            for _ in range(_TRIES):
                scene = sample_scene(rng, kinds=KINDS if is_known else _KINDS, split="train")
                if _is_held_out(caption(scene)) == held_out:
                    prompts.setdefault(caption(scene, noisy=frozenset() if is_known else self.noisy))
                if len(prompts) > size:
                    break
        return list(prompts)


def _is_held_out(prompt: str) -> bool:
    """One prompt in ten, whatever else is in the file and wherever it stands."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10 == 0


def split_prompts(prompts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prompts to train on and prompts to validate on; of fewer than ten, all are trained on and none held out."""
    unique = tuple(dict.fromkeys(prompts))
    held_out = tuple(prompt for prompt in unique if _is_held_out(prompt))
    if len(unique) < _SPLIT_FROM:
        return unique, ()
    held_out = held_out or (min(unique, key=lambda prompt: hashlib.sha256(prompt.encode()).hexdigest()),)
    return tuple(prompt for prompt in unique if prompt not in set(held_out)), held_out


def load_prompts(source: str | None, *, base: str, canonical: float, anchors: str | None = None) -> PromptSet:
    """The prompt set that ``source`` names: a list, ``shapes:WORDS``, or ``None`` for the base's own.

    ``anchors`` is a list of prompts whose meaning is to stay as it is.

    Raises:
        PromptError: a base without prompts of its own, an unknown selection, or a list that cannot be used.
    """
    anchored = _read_plain(anchors).prompts if anchors is not None else ()
    if source is None and base not in SHAPES:
        raise PromptError(f"the base {base!r} brings no prompts of its own; give a file with --prompts FILE")
    if source is None:
        source = "shapes:colour"
    if source.startswith("shapes:"):
        return ShapesPrompts(_find_words(source), canonical, anchored)
    listed = _read_plain(source)
    prompts, held_out = split_prompts(listed.prompts)
    _LOG.info("%s; %s", listed, f"{len(held_out):,} held out" if held_out else "too few to hold any out")
    return ListedPrompts(prompts, held_out, anchored, listed)


def held_out_prompts(source: str) -> list[str]:
    """The prompts to evaluate on that ``source`` names: a list's, or held-out ones of ``shapes:WORDS``.

    Raises:
        PromptError: an unknown selection, or a list that cannot be used.
    """
    if source.startswith("shapes:"):
        return sample_prompts(_HELD_OUT, 0, split="test", noisy=_find_words(source))
    listed = _read_plain(source)
    _LOG.info("%s", listed)
    return list(listed.prompts)


def training_prompts(source: str) -> list[str]:
    """Prompts that a training with the same ``--prompts`` draws from.

    A list's without those that it holds out, or seen combinations of ``shapes:WORDS``.

    Raises:
        PromptError: as :func:`held_out_prompts`.
    """
    if source.startswith("shapes:"):
        return sample_prompts(_HELD_OUT, 0, split="train", noisy=_find_words(source))
    prompts, _ = split_prompts(_read_plain(source).prompts)
    return list(prompts)


def _find_words(source: str) -> frozenset[str]:
    words = source.removeprefix("shapes:")
    if words not in _WORDS:
        raise PromptError(
            f"no prompts {source!r}; there are {', '.join(f'shapes:{name}' for name in _WORDS)}, or a file"
        )
    return _WORDS[words]


def _read_plain(source: str) -> PromptList:
    listed = read_source(source)
    refuse_markup(listed.prompts)
    return listed


def refuse_markup(prompts: Iterable[str]) -> None:
    """Refuse prompts with tags or weights where only words are read.

    Raises:
        PromptError: names the prompt.
    """
    for prompt in prompts:
        refuse_tags(prompt, "tags are for apply; give the adapter as an option")
        if is_weighted(prompt):
            raise PromptError(f"{prompt!r} holds weights, which only apply reads; write the words alone")


def gather_prompts(given: Sequence[str], source: str | None) -> tuple[str, ...]:
    """The prompts of a command line, then those of a list; who writes a prompt twice wants two pictures.

    Raises:
        PromptError: there is none, or the list cannot be read or holds none.
    """
    prompts = (*given, *(read_source(source).written if source is not None else ()))
    if not prompts:
        raise PromptError("no prompt; give --prompt TEXT or --prompts FILE")
    return prompts


def read_prompts(source: str | Path) -> tuple[str, ...]:
    """The prompts of a list, as :func:`~texforce_hub.generate.prompts.sources.read_source`.

    Raises:
        PromptError: it cannot be read, or holds no prompt.
    """
    return read_source(source).prompts
