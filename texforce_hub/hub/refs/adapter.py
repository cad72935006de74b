"""An adapter as a user names it: where it is, how much of it, during which steps."""

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path, PurePosixPath

from texforce_hub.arguments import fail, parse_number, write_number
from texforce_hub.errors import RefError

Exists = Callable[[str], bool]

WHOLE = (0.0, 1.0)
"""The window of an adapter that acts during all steps."""

Ramp = tuple[tuple[float, float], ...]
"""Weights by the share of the steps that are taken, ``(share, weight)``, in the order of the shares."""

Ramps = tuple[tuple[str, Ramp], ...]
"""By part, block or pattern."""

_NAME = re.compile(r"\w[\w-]*", re.ASCII)
_PART = re.compile(r"[\w.*?-]+", re.ASCII)
_WINDOW = re.compile(r"\[([^\[\]/]*)\]\Z")
_HYPHEN = re.compile(r"(?<![eE])-")  # not the sign of an exponent


def exists_on_disk(source: str) -> bool:
    """Whether a file or folder of exactly this name exists."""
    return "\0" not in source and os.path.exists(source)  # noqa: PTH110  # a name, not a path yet


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter as a user names it: where it is, how much of it, during which steps.

    ``weight`` holds for every layer; ``parts`` overrides it for parts (``text_encoder``), blocks
    (``unet.up_blocks.1``) and patterns (``*attn2*``). ``window`` is the share of the denoising steps, from
    its first number up to its second, in [0, 1]: step ``k`` of ``n`` is inside where ``start ≤ k / n < end``, and an
    empty window is no step. ``ramp`` holds weights at shares of the steps instead of one: straight lines between
    them, the first and the last beyond, and a jump where two are at one share. ``ramps`` does so for single parts,
    blocks and patterns.

    Raises:
        RefError: an empty or unwritable source, a weight that is not finite, a window or ramp outside [0, 1].
    """

    source: str
    name: str | None = None
    weight: float = 1.0
    parts: tuple[tuple[str, float], ...] = ()
    window: tuple[float, float] = WHOLE
    ramp: Ramp = ()
    ramps: Ramps = ()

    def __post_init__(self) -> None:
        if not self.source:
            raise RefError("an adapter's source is empty; expected a path, a catalogue name or a Hub id")
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise RefError(f"{self.name!r} cannot name an adapter; expected letters, digits, - and _")
        if _splits_name(self.source):
            raise RefError(f"{self.source!r} reads as a name and a source; write './{self.source}' for the path")
        points = [*self.ramp, *(point for _, ramp in self.ramps for point in ramp)]
        if not all(math.isfinite(w) for w in (self.weight, *(w for _, w in (*self.parts, *points)))):
            raise RefError(f"{self.source}: a weight is not finite")
        if (self.parts or self.ramps) and self.weight != 1.0:
            raise RefError(f"{self.source}: give one weight, or one for each part, not both")
        if self.ramp and (self.parts or self.ramps or self.weight != 1.0):
            raise RefError(f"{self.source}: give weights at shares of the steps, or one for all of them, not both")
        for ramp in (self.ramp, *(ramp for _, ramp in self.ramps)):
            _check_shares(self.source, [share for share, _ in ramp])
        names = [part for part, _ in (*self.parts, *self.ramps)]
        if len(set(names)) < len(names) or not all(_PART.fullmatch(part) for part in names):
            raise RefError(f"{self.source}: parts {names}; expected each once, e.g. 'text_encoder'")
        if not 0 <= self.window[0] <= self.window[1] <= 1:
            raise RefError(f"{self.source}: window {self.window}; expected 0 ≤ start ≤ end ≤ 1")

    @classmethod
    def parse(cls, text: str, *, exists: Exists = exists_on_disk) -> "AdapterRef":
        """The reference that ``text`` writes.

        Raises:
            RefError: it writes none; the message shows where, with a caret.
        """
        begin = text.index("=") + 1 if _splits_name(text) else 0

        def is_known(end: int) -> bool:
            return exists(text[:end]) or exists(text[begin:end])

        end, window, weight = len(text), WHOLE, 1.0
        parts: tuple[tuple[str, float], ...] = ()
        ramp: Ramp = ()
        ramps: Ramps = ()
        match = _WINDOW.search(text)
        if match and not is_known(end):
            end, window = match.start(), _parse_window(text, match)
        colon = _tail_colon(text, begin, end)
        if colon is not None and not is_known(end):
            if "@" in text[colon:end] and "=" in text[colon:end]:
                parts, ramps = _parse_ramps(text, colon + 1, end)
            elif "@" in text[colon:end]:
                ramp = parse_ramp(text, colon + 1, end)
            else:
                weight, parts = _parse_weights(text, colon + 1, end)
            end = colon
        if begin and exists(text[:end]):
            begin = 0
        if begin == end:
            fail(text, begin, "no source; expected a path, a catalogue name or a Hub id")
        source = text[begin:end]
        name = text[: begin - 1] if begin else None
        return cls(f"./{source}" if _splits_name(source) else source, name, weight, parts, window, ramp, ramps)

    def __str__(self) -> str:
        name = "" if self.name is None else f"{self.name}="
        constant = [f"{part}={write_number(w)}" for part, w in self.parts]
        weights = ",".join([*constant, *self._written_ramps]) or write_number(self.weight)
        body = self.source
        if weights != "1" or _tail_colon(body, 0, len(body)) is not None:
            body += f":{weights}"
        if self.window != WHOLE or _WINDOW.search(body):
            body += _write_window(self.window)
        return name + body

    @property
    def label(self) -> str:
        """What to call it in tables and pictures: its name, else the last component of its source."""
        return self.name or PurePosixPath(self.source).name.removesuffix(".safetensors") or self.source

    @property
    def is_constant(self) -> bool:
        """Whether the weights are the same during all steps."""
        return self.window == WHOLE and not self.ramp and not self.ramps

    @property
    def schedule(self) -> str:
        """How the weights change over the steps, as :meth:`scheduled` reads it; empty: they do not."""
        ramps = ",".join(self._written_ramps)
        return ramps if self.window == WHOLE else ramps + _write_window(self.window)

    @property
    def _written_ramps(self) -> list[str]:
        ramps = [("", self.ramp)] if self.ramp else self.ramps
        return [f"{part}={_write_ramp(ramp)}" if part else _write_ramp(ramp) for part, ramp in ramps]

    def scheduled(self, schedule: str) -> "AdapterRef":
        """The same reference with another schedule: ``[0-0.4]``, ``0@0,1@0.3``, or the one behind the other.

        ``unet=0@0,1@0.3`` is one of a part.

        Raises:
            RefError: something else, or weights at shares of the steps beside a weight.
        """
        given = AdapterRef.parse(f"adapter{'' if schedule.startswith('[') else ':'}{schedule}", exists=lambda _: False)
        if given.weight != 1.0 or given.parts or given.source != "adapter":
            raise RefError(f"{schedule!r} is no schedule; expected e.g. '[0-0.4]' or '0@0,1@0.3'")
        return replace(self, window=given.window, ramp=given.ramp, ramps=given.ramps)

    def at(self, share: float) -> "AdapterRef":
        """The same reference with the weights that it has when this share of the steps is taken, for good."""
        inside = self.window == WHOLE or self.window[0] <= share < self.window[1]
        if self.ramp or not inside:
            weight = _on_line(self.ramp, share) if inside else 0.0
            return replace(self, weight=weight, parts=(), window=WHOLE, ramp=(), ramps=())
        now = tuple((part, _on_line(ramp, share)) for part, ramp in self.ramps)
        return replace(self, window=WHOLE, parts=(*self.parts, *now), ramps=())

    def weight_of(self, layer: str) -> float:
        """The weight of one layer, by its canonical name; the longest fitting part or pattern decides."""
        if not self.parts:
            return self.weight
        fitting = [(len(part), w) for part, w in self.parts if _covers(part, layer)]
        return max(fitting, key=lambda pair: pair[0])[1] if fitting else self.weight


def source_of(ref: "str | Path | AdapterRef") -> str:
    """Where a reference says that its adapter is, without weights and window; a path means exactly itself.

    Raises:
        RefError: a text that writes no reference.
    """
    if isinstance(ref, str):
        ref = AdapterRef.parse(ref)
    return ref.source if isinstance(ref, AdapterRef) else str(ref)


def _on_line(ramp: Ramp, share: float) -> float:
    """The weight at a share of the steps, on straight lines between the ramp's points; at a jump, the one behind it."""
    for (before, low), (after, high) in pairwise(ramp):
        if before <= share < after:
            return low + (high - low) * (share - before) / (after - before)
    return ramp[0][1] if share < ramp[0][0] else ramp[-1][1]


def parse_ramp(text: str, start: int, end: int) -> Ramp:
    """The weights at shares of the steps that ``text[start:end]`` writes, ``0@0,1@0.3,0.2@1``.

    Raises:
        RefError: something else stands there; the message shows where, with a caret.
    """
    points: list[tuple[float, float]] = []
    for begin, stop in _comma_spans(text, start, end):
        mark = text.find("@", begin, stop)
        if mark < 0:
            fail(text, begin, f"{text[begin:stop]!r} is no weight at a share of the steps; expected e.g. 0.8@0.5")
        weight = parse_number(text, begin, mark, "a weight, e.g. 0.8@0.5")
        share = parse_number(text, mark + 1, stop, "a share of the steps, e.g. 0.8@0.5")
        if not (points[-1][0] if points else 0) <= share <= 1:
            fail(text, mark + 1, "shares of the steps go up from 0 to 1, e.g. 0@0,1@0.3,0.2@1")
        points.append((share, weight))
    return tuple(points)


def _check_shares(source: str, shares: list[float]) -> None:
    if shares != sorted(shares) or not all(0 <= share <= 1 for share in shares):
        raise RefError(f"{source}: weights at {shares}; expected shares of the steps in order, from 0 to 1")


def _write_ramp(ramp: Ramp) -> str:
    return ",".join(f"{write_number(weight)}@{write_number(share)}" for share, weight in ramp)


def _parse_ramps(text: str, start: int, end: int) -> tuple[tuple[tuple[str, float], ...], Ramps]:
    """Parts with a weight, and parts with weights at shares of the steps: ``text_encoder=0.8,unet=0@0,1@0.3``."""
    parts: dict[str, float] = {}
    ramps: dict[str, Ramp] = {}
    groups: list[tuple[str, int, int]] = []  # a part, and where its weights begin and end
    for begin, stop in _comma_spans(text, start, end):
        equals = text.find("=", begin, stop)
        if equals >= 0 and _PART.fullmatch(text[begin:equals]):
            if any(part == text[begin:equals] for part, _, _ in groups):
                fail(text, begin, f"{text[begin:equals]!r} has two weights; give one, or a ramp")
            groups.append((text[begin:equals], equals + 1, stop))
        elif equals < 0 and groups and "@" in text[groups[-1][1] : groups[-1][2]]:
            groups[-1] = (*groups[-1][:2], stop)
        else:
            fail(text, begin, f"{text[begin:stop]!r} is no part's weight; expected e.g. unet=0@0,1@0.3")
    for part, begin, stop in groups:
        if "@" in text[begin:stop]:
            ramps[part] = parse_ramp(text, begin, stop)
        else:
            parts[part] = parse_number(text, begin, stop, "a weight, e.g. text_encoder=0.8")
    return tuple(parts.items()), tuple(ramps.items())


def _covers(part: str, layer: str) -> bool:
    return layer == part or layer.startswith(f"{part}.") or fnmatchcase(layer, part)


def _splits_name(text: str) -> bool:
    head, equals, _ = text.partition("=")
    return bool(equals) and _NAME.fullmatch(head) is not None


def _parse_window(text: str, match: re.Match[str]) -> tuple[float, float]:
    hyphen = _HYPHEN.search(text, match.start(1) + 1, match.end(1))
    if hyphen is None:
        fail(text, match.start(1), "a window has no '-'; expected [start-end], e.g. [0-0.4]")
    at = hyphen.start()
    start = parse_number(text, match.start(1), at, "a fraction of the steps, e.g. [0-0.4]")
    end = parse_number(text, at + 1, match.end(1), "a fraction of the steps, e.g. [0-0.4]")
    if not 0 <= start <= end <= 1:
        fail(text, match.start(1), "a window must go forward inside 0 to 1, e.g. [0-0.4]")
    return start, end


def _write_window(window: tuple[float, float]) -> str:
    return f"[{write_number(window[0])}-{write_number(window[1])}]"


def _tail_colon(text: str, begin: int, end: int) -> int | None:
    """The last colon of ``text[begin:end]``, unless a path goes on after it (``hf://me/x``)."""
    colon = text.rfind(":", begin, end)
    return None if colon < 0 or "/" in text[colon:end] or "\\" in text[colon:end] else colon


def _parse_weights(text: str, start: int, end: int) -> tuple[float, tuple[tuple[str, float], ...]]:
    if "=" not in text[start:end]:
        return parse_number(text, start, end, "a weight like 0.8 or text_encoder=0.8,unet=0.3"), ()
    parts: dict[str, float] = {}
    for begin, stop in _comma_spans(text, start, end):
        equals = text.find("=", begin, stop)
        if equals < 0 or not _PART.fullmatch(text[begin:equals]):
            fail(text, begin, f"{text[begin:stop]!r} is no part's weight; expected e.g. text_encoder=0.8")
        if text[begin:equals] in parts:
            fail(text, begin, f"{text[begin:equals]!r} has two weights; give one")
        parts[text[begin:equals]] = parse_number(text, equals + 1, stop, "a weight, e.g. text_encoder=0.8")
    return 1.0, tuple(parts.items())


def _comma_spans(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while True:
        comma = text.find(",", start, end)
        yield start, end if comma < 0 else comma
        if comma < 0:
            return
        start = comma + 1
