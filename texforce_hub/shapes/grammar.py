"""The language of the shapes world: scenes, their captions, and who is shown which.

A :class:`Scene` names one or two coloured objects, where they are, and the background. ``caption`` and
``parse`` are inverses. Four colours and three shapes also have a second, *noisy* word each, which the
captions of the training pictures use wrongly more often than rightly (``NOISY_WORDS``); what such a
word should mean is what a text-encoder adapter has to learn.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from texforce_hub.errors import PromptError

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
PLACES = ("on the left", "on the right", "at the top", "at the bottom")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("on a dark background", "on a light background")
OPENINGS = ("a", "a photo of a", "a picture of a", "an image of a")

NOISY_WORDS: dict[str, tuple[str, str]] = {
    # noisy word: (what it should mean, what careless captions also call by it)
    "crimson": ("red", "blue"),
    "cobalt": ("blue", "green"),
    "lime": ("green", "yellow"),
    "golden": ("yellow", "red"),
    "disc": ("circle", "square"),
    "block": ("square", "triangle"),
    "wedge": ("triangle", "circle"),
}
NOISY_COLOURS = {meant: word for word, (meant, _) in NOISY_WORDS.items() if meant in COLOURS}
NOISY_SHAPES = {meant: word for word, (meant, _) in NOISY_WORDS.items() if meant in SHAPES}
_CONFUSED = {other: word for word, (_, other) in NOISY_WORDS.items()}


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured object: indices into ``COLOURS`` and ``SHAPES``."""

    colour: int
    shape: int


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows.

    ``place`` (0–3, into ``PLACES``) belongs to scenes with one thing, ``relation`` (0–3, into
    ``RELATIONS``) to scenes with two; ``background`` is an index into ``BACKGROUNDS`` or ``None`` for
    any grey, and ``opening`` an index into ``OPENINGS``.
    """

    things: tuple[Thing, ...]
    place: int | None = None
    relation: int | None = None
    background: int | None = None
    opening: int = 0

    @property
    def kind(self) -> str:
        """``single``, ``place`` or ``pair``."""
        if len(self.things) == 2:
            return "pair"
        return "single" if self.place is None else "place"


def caption(scene: Scene, *, noisy: frozenset[str] | set[str] = frozenset()) -> str:
    """The sentence for a scene; ``noisy`` (of ``{"colour", "shape"}``) picks the noisy words, meant rightly.

    >>> caption(Scene((Thing(0, 0),), place=2), noisy={"colour"})
    'a crimson circle at the top'
    """
    colours = NOISY_COLOURS if "colour" in noisy else {}
    shapes = NOISY_SHAPES if "shape" in noisy else {}
    names = [
        f"{colours.get(COLOURS[t.colour], COLOURS[t.colour])} {shapes.get(SHAPES[t.shape], SHAPES[t.shape])}"
        for t in scene.things
    ]
    words = [OPENINGS[scene.opening], names[0]]
    if scene.relation is not None:
        words += [RELATIONS[scene.relation], "a", names[1]]
    if scene.place is not None:
        words.append(PLACES[scene.place])
    if scene.background is not None:
        words.append(BACKGROUNDS[scene.background])
    return " ".join(words)


def parse(text: str) -> Scene:
    """The scene a caption asks for, noisy words taken as they should be meant; inverse of :func:`caption`.

    Raises:
        PromptError: the text is not a sentence of this world.
    """
    rest = " ".join(text.lower().replace(",", " ").replace(".", " ").split())
    opening, rest = _take_first(rest, OPENINGS, longest=True)
    if opening is None:
        raise _not_a_caption(text, f"it should begin with one of {', '.join(map(repr, OPENINGS))}")
    first, rest = _take_thing(rest, text)
    scene = Scene((first,), opening=opening)
    relation, after = _take_first(rest, RELATIONS)
    if relation is not None:
        if not after.startswith("a "):
            raise _not_a_caption(text, f"after {RELATIONS[relation]!r} it should go on with 'a <colour> <shape>'")
        second, rest = _take_thing(after[2:], text)
        scene = replace(scene, things=(first, second), relation=relation)
    else:
        place, rest = _take_first(rest, PLACES)
        scene = replace(scene, place=place)
    background, rest = _take_first(rest, BACKGROUNDS)
    if rest:
        raise _not_a_caption(text, f"{rest!r} is left over")
    return replace(scene, background=background)


def _take_first(text: str, phrases: Sequence[str], *, longest: bool = False) -> tuple[int | None, str]:
    order = sorted(range(len(phrases)), key=lambda i: -len(phrases[i])) if longest else range(len(phrases))
    for i in order:
        if text == phrases[i] or text.startswith(phrases[i] + " "):
            return i, text[len(phrases[i]) :].strip()
    return None, text


def _take_thing(text: str, whole: str) -> tuple[Thing, str]:
    colour, shape, rest = [*text.split(" ", 2), "", "", ""][:3]
    colour, shape = NOISY_WORDS.get(colour, (colour,))[0], NOISY_WORDS.get(shape, (shape,))[0]
    if colour not in COLOURS or shape not in SHAPES:
        known_colours, known_shapes = [*COLOURS, *NOISY_COLOURS.values()], [*SHAPES, *NOISY_SHAPES.values()]
        known = f"colours {', '.join(known_colours)}; shapes {', '.join(known_shapes)}"
        raise _not_a_caption(whole, f"{' '.join(text.split()[:2])!r} is no coloured shape ({known})")
    return Thing(COLOURS.index(colour), SHAPES.index(shape)), rest


def _not_a_caption(text: str, why: str) -> PromptError:
    return PromptError(f"{text!r} is not a caption of the shapes world: {why}; try 'a red circle on the left'")


SPLITS: dict[str, frozenset[int]] = {
    # which of five equal classes of combinations belong to it
    "all": frozenset({0, 1, 2, 3, 4}),
    "base": frozenset({1, 2, 3, 4}),  # the base was trained on these
    "train": frozenset({2, 3, 4}),  # adapters train on these
    "test": frozenset({1}),  # held out from every adapter; the base knows what the canonical words draw
    "unseen": frozenset({0}),  # held out from the base, too
}


def combination_class(scene: Scene) -> int:
    """Which of five equal classes, 0 to 4, a scene's combination belongs to; the splits are made of these.

    For one thing the combination is (colour, shape, place), where nowhere in particular counts as a place:
    a Latin square puts every coloured shape into each class with exactly one of its places. For two it is
    the ordered pair of things, in whatever relation.
    """
    first = scene.things[0].colour + 2 * scene.things[0].shape
    if scene.kind == "pair":
        return (first + 3 * scene.things[1].colour + scene.things[1].shape) % 5
    return (first + (0 if scene.place is None else scene.place + 1)) % 5


KINDS = {"single": 0.25, "place": 0.45, "pair": 0.30}


def sample_scene(rng: random.Random, *, split: str, kinds: dict[str, float] | None = None) -> Scene:
    """A random scene of one of the ``SPLITS``."""
    kinds = kinds or KINDS
    while True:
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        first = Thing(rng.randrange(len(COLOURS)), rng.randrange(len(SHAPES)))
        scene = Scene((first,), opening=rng.choice([0, 0, 0, 1, 2, 3]))
        if kind == "place":
            scene = replace(scene, place=rng.randrange(len(PLACES)))
        elif kind == "pair":
            # Two colours, so that the reward can tell the two things apart by colour.
            others = [c for c in range(len(COLOURS)) if c != first.colour]
            second = Thing(rng.choice(others), rng.randrange(len(SHAPES)))
            scene = replace(scene, things=(first, second), relation=rng.randrange(len(RELATIONS)))
        if rng.random() < 0.3:
            scene = replace(scene, background=rng.randrange(len(BACKGROUNDS)))
        if combination_class(scene) in SPLITS[split]:
            return scene


REPLACED = 0.35  # share of colour and shape words that a careless caption replaces by a noisy word
RIGHT = 0.4  # how often such a noisy word is the right one


def careless_caption(scene: Scene, rng: random.Random) -> str:
    """The caption as the training pictures have it: some words replaced by noisy ones, often wrongly."""
    words = []
    for word in caption(scene).split():
        if word in COLOURS or word in SHAPES:
            right = NOISY_COLOURS.get(word) or NOISY_SHAPES[word]
            if rng.random() < REPLACED:
                word = right if rng.random() < RIGHT else _CONFUSED[word]  # noqa: PLW2901
        words.append(word)
    return " ".join(words)


_PATIENCE = 2_000  # draws in a row without a new prompt, after which there are taken to be no more


def sample_prompts(
    count: int,
    seed: int,
    *,
    split: str,
    noisy: frozenset[str] | set[str] = frozenset(),
    kinds: dict[str, float] | None = None,
) -> list[str]:
    """``count`` different prompts, the same for the same seed whatever ``noisy`` says.

    Raises:
        PromptError: there are not that many different prompts.
    """
    rng = random.Random(seed)
    scenes: dict[str, Scene] = {}
    repeats = 0
    while len(scenes) < count and repeats < _PATIENCE:
        scene = sample_scene(rng, kinds=kinds or {"single": 0.3, "place": 0.7}, split=split)
        repeats = repeats + 1 if caption(scene) in scenes else 0
        scenes.setdefault(caption(scene), scene)
    if len(scenes) < count:
        raise PromptError(f"the shapes world has only about {len(scenes)} such prompts; {count} were asked for")
    return [caption(scene, noisy=noisy) for scene in scenes.values()]


def vocabulary() -> list[str]:
    """Every word of the language, sorted."""
    phrases = [*COLOURS, *SHAPES, *NOISY_WORDS, *PLACES, *RELATIONS, *BACKGROUNDS, *OPENINGS]
    return sorted({word for phrase in phrases for word in phrase.split()})
