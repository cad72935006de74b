"""Which words stacks move: every word's shift and its attention, measured on the base, with small pictures of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import ConfigError, TexForceHubError
from texforce_hub.evaluate.attention import PromptAttention, WordAttention, measure_attention
from texforce_hub.evaluate.report.acting import find_here
from texforce_hub.evaluate.report.content import Content
from texforce_hub.evaluate.report.pictures import Embedded, embed
from texforce_hub.evaluate.words import PromptShift, measure_words
from texforce_hub.families.names import part_of
from texforce_hub.generate.prompts.tags import TaggedPrompt
from texforce_hub.hub.find import find_local
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.stack import Item, StackEntry, read_stack
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.reading import is_there

_MOST_STACKS = 3
_SIDE = 128  # pixels of a map's longer side
_HOT = np.array([255.0, 138.0, 0.0])
_STRONGEST = 0.85  # of the glow: something of the picture stays
STEPS, GUIDANCE, SEED = 15, 5.0, 0
"""How the pictures are drawn in which attention is watched."""


@dataclass(frozen=True, slots=True)
class Word:
    """One word: its shift, as a number and as a share of the largest; its attention before and after, if watched."""

    word: str
    shift: float | None = None
    cosine: float | None = None
    share: float = 0.0
    attention: tuple[float, float] | None = None
    maps: tuple[Embedded, Embedded] | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """What a stack does to the words of a prompt, and the pictures in which attention was watched."""

    stack: str
    prompt: str
    words: tuple[Word, ...]
    drawn: tuple[Embedded, Embedded] | None = None


def measure_moves(
    content: Content, *, count: int, base: str | None = None, device: str | None = None, dtype: str | None = None
) -> tuple[list[Moved], list[str]]:
    """What the content's stacks do to the words of its first ``count`` prompts; and a line for what was not measured.

    Nothing is fetched that the folders name: a base is loaded if it is ``shapes``, lies here, or is given as ``base``.
    """
    prompts = [prompt for prompt in content.prompts if _is_plain(prompt)][:count]
    stacks: dict[tuple[str, ...], tuple[str, ...]] = {}
    for stack in content.stacks:
        stacks.setdefault(_sources(stack), stack)  # of those that differ in weights alone the first
    if not count or not stacks:
        return [], ["which words it moves: not measured"] if stacks else []
    if not prompts:
        return [], ["which words it moves: no prompt is known; give one with --prompt"]
    try:
        pipe = load_pipeline(base or _base_here(content), unet=_unet_here(content), device=device, dtype=dtype)
    except TexForceHubError as error:
        return [], [f"which words it moves: {error}"]
    moved: list[Moved] = []
    lines: list[str] = []
    for number, stack in enumerate(stacks.values()):
        if number >= _MOST_STACKS:
            lines.append(f"which words {_title_of(stack)} moves: {_MOST_STACKS} stacks are measured; report it alone")
            continue
        lines += _measure_stack(pipe, stack, prompts, moved)
    return moved, list(dict.fromkeys(lines))


def _base_here(content: Content) -> str:
    """The base that the folders name.

    Raises:
        ConfigError: they name none, or one that is not on this disk.
    """
    if content.base == "shapes" or (content.base and is_there(content.base)):
        return content.base
    name = f"the base {content.base!r} is not on this disk" if content.base else "no base is named"
    raise ConfigError(f"{name}; --base BASE loads one")


def _unet_here(content: Content) -> str | None:
    """The tuned U-Net that the folders name.

    Raises:
        ConfigError: it is on the Hub.
        RefError: nothing of that name.
    """
    if not content.unet:
        return None
    if find_local(AdapterRef.parse(content.unet)) is None:
        raise ConfigError(f"the U-Net {content.unet!r} is not on this disk; pull it and draw with its path")
    return content.unet


def _measure_stack(pipe: Any, stack: Sequence[str], prompts: Sequence[str], moved: list[Moved]) -> Iterator[str]:
    """Add to ``moved`` what can be measured of one stack; a line for each thing that cannot."""
    try:
        entries = read_stack(list(_read_here(stack)), scheduled=True)
    except TexForceHubError as error:
        yield f"which words {' + '.join(stack)} moves: {error}"
        return
    title = _title_of(stack)
    text = list(_text_items(entries))
    shifts, attention = list[PromptShift](), list[PromptAttention]()
    if text:
        shifts, line = _attempt(lambda: measure_words(pipe, text, prompts))
        yield from line
    else:
        yield f"{title}: has no layer of a text encoder, so it moves no word's embedding"
    items = [entry.item for entry in entries]
    how: dict[str, Any] = {"seed": SEED, "inference_steps": STEPS, "guidance": GUIDANCE}
    attention, line = _attempt(lambda: measure_attention(pipe, items, prompts, **how))
    yield from line
    largest = max((word.shift for shift in shifts for word in shift.words), default=0.0) or 1.0
    for number, prompt in enumerate(prompts):
        shift, seen = (measured[number] if measured else None for measured in (shifts, attention))
        if shift is not None or seen is not None:
            moved.append(_view(title, prompt, shift, seen, largest))  # type: ignore[arg-type]


def _attempt(measure: Callable[[], list[Any]]) -> tuple[list[Any], list[str]]:
    try:
        return measure(), []
    except TexForceHubError as error:
        return [], [f"which words it moves: {error}"]


def _view(stack: str, prompt: str, shift: PromptShift | None, seen: PromptAttention | None, largest: float) -> Moved:
    names = [word.word for word in (shift.words if shift else seen.words if seen else ())]
    words = []
    for number, name in enumerate(names):
        moved = shift.words[number] if shift else None
        watched = seen.words[number] if seen else None
        words.append(
            Word(
                name,
                None if moved is None else moved.shift,
                None if moved is None else moved.cosine,
                0.0 if moved is None else moved.shift / largest,
                None if watched is None else watched.shares,
                None if watched is None or seen is None else _draw_maps(watched, seen),
            )
        )
    drawn = None if seen is None else (embed(_enlarge(seen.before)), embed(_enlarge(seen.after)))
    return Moved(stack, prompt, tuple(words), drawn)


def _draw_maps(word: WordAttention, seen: PromptAttention) -> tuple[Embedded, Embedded]:
    """Both maps over their pictures, on one scale."""
    peak = max(float(word.before.max()), float(word.after.max())) or 1.0
    before, after = _heat(seen.before, word.before / peak), _heat(seen.after, word.after / peak)
    return embed(before), embed(after)


def _heat(image: Image.Image, shares: Tensor) -> Image.Image:
    """A picture, grey and dim, with a map ``(h, w)`` in [0, 1] glowing over it."""
    grey = _enlarge(image).convert("L")
    glow = Image.fromarray((shares.clamp(0, 1) * 255).byte().numpy()).resize(grey.size, Image.Resampling.BICUBIC)
    strength = _STRONGEST * (np.asarray(glow, dtype=np.float32) / 255)[..., None] ** 1.5
    dim = np.asarray(grey, dtype=np.float32)[..., None] * 0.6
    return Image.fromarray((dim * (1 - strength) + _HOT * strength).clip(0, 255).astype(np.uint8))


def _enlarge(image: Image.Image) -> Image.Image:
    """A picture whose longer side has about so many pixels as a map; small ones by a whole number."""
    longer = max(image.size)
    if longer >= _SIDE:
        smaller = image.convert("RGB")
        smaller.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        return smaller
    factor = _SIDE // longer
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _text_items(entries: Sequence[StackEntry]) -> Iterator[Item]:
    for entry in entries:
        layers = {name: layer for name, layer in entry.adapter.layers.items() if part_of(name).startswith("text_")}
        if layers:
            yield Adapter(layers), entry.item[1]


def _read_here(stack: Sequence[str]) -> Iterator[AdapterRef]:
    """The references of a stack, none of which would be fetched.

    Raises:
        ConfigError: one lies on the Hub.
        RefError: nothing of that name.
    """
    for text in stack:
        ref = AdapterRef.parse(text)
        if find_here(ref) is None:
            raise ConfigError(f"{ref.label} is on the Hub; pull it and name it by its path")
        yield ref


def _sources(stack: Sequence[str]) -> tuple[str, ...]:
    """A stack without its weights."""
    return tuple(text.rpartition(":")[0] or text for text in stack)


def _title_of(stack: Sequence[str]) -> str:
    """The labels of a stack with their weights, without where they lie."""
    refs = [AdapterRef.parse(text) for text in stack]
    return " + ".join(ref.label + str(replace(ref, source="a", name=None)).removeprefix("a") for ref in refs)


def _is_plain(prompt: str) -> bool:
    try:
        return TaggedPrompt.parse(prompt).text == prompt
    except TexForceHubError:
        return False
