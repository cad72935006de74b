"""Adapters inside a prompt, as A1111's web UI and its relatives write them.

::

    TAG    = "<" ("lora" | "lyco") ":" NAME {":" WEIGHT} {":" ("te" | "unet" | "start" | "end") "=" number} ">"
    WEIGHT = number | number "@" share {"," number "@" share}

The first number is the text encoder's weight (1 without it), the second the U-Net's (the first without it), as
in A1111's ``extra_networks_lora.py``; ComfyUI's tag loaders take the two the other way round. ``te=`` and
``unet=`` win over a number in their place. ``start=`` and ``end=`` are shares of the denoising steps between which the
adapter acts; a weight of the form ``0@0,1@0.3`` (loractl's) changes over them. ``lyco`` is an old spelling of ``lora``.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from texforce_hub.arguments import check_kind, fail, parse_number, write_number
from texforce_hub.errors import PromptError, RefError
from texforce_hub.hub.refs.adapter import WHOLE, AdapterRef, parse_ramp

_TAG = re.compile(r"<(\w+):([^<>]*)(>?)", re.ASCII)
_OPENED = re.compile(r"<(?:lora|lyco)\b")
_KEYS = {
    "te": "the text encoder's weight",
    "unet": "the U-Net's weight",
    "start": "the share at which it begins",
    "end": "the share at which it ends",
}
_DYNAMIC = "cuts the rank while loading, which is not done here; texforce-hub resize writes a file of that rank"


@dataclass(frozen=True, slots=True)
class PromptTag:
    """One tag of a prompt: the adapter's name, and how much of its text encoder's and of its U-Net's change.

    ``schedule``: when during the denoising steps, as :meth:`AdapterRef.scheduled` reads it; empty: always.

    Raises:
        RefError: a name that a tag cannot hold, or a weight that is not finite.
    """

    name: str
    text_encoder: float = 1.0
    unet: float = 1.0
    schedule: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip() or self.name != self.name.strip() or not set(self.name).isdisjoint("<>:=\n"):
            raise RefError(f"{self.name!r} cannot stand in a tag; expected a name without < > : = around or in it")
        if not math.isfinite(self.text_encoder) or not math.isfinite(self.unet):
            raise RefError(f"<lora:{self.name}>: a weight is not finite")
        if self.schedule:
            ref = AdapterRef("tag").scheduled(self.schedule)
            if ref.is_constant or (ref.ramp and (self.text_encoder, self.unet) != (1.0, 1.0)):
                raise RefError(f"<lora:{self.name}>: {self.schedule!r} is no schedule, or stands beside a weight")

    @classmethod
    def parse(cls, text: str) -> "PromptTag":
        """The tag that ``text`` is.

        Raises:
            RefError: it is none; the message shows where, with a caret.
        """
        match = _TAG.fullmatch(text)
        if match is None:
            fail(text, 0, "not a tag; expected <lora:NAME:WEIGHT>")
        return _read_tag(text, match)

    def __str__(self) -> str:
        second = "" if self.unet == self.text_encoder else f":{write_number(self.unet)}"
        ramp, _, window = self.schedule.partition("[")
        when = ""
        if window:
            start, end = AdapterRef("tag").scheduled(self.schedule).window
            when = f":start={write_number(start)}:end={write_number(end)}"
        return f"<lora:{self.name}:{ramp or write_number(self.text_encoder) + second}{when}>"


@dataclass(frozen=True, slots=True)
class TaggedPrompt:
    """A prompt's words, and the tags that stood among them, in order."""

    text: str
    tags: tuple[PromptTag, ...] = ()

    @classmethod
    def parse(cls, prompt: str) -> "TaggedPrompt":
        """The words and tags of a prompt; where tags stood, runs of blanks become one.

        Raises:
            RefError: a tag that cannot be read; the message shows where, with a caret.
        """
        check_kind(prompt, str, "a prompt is one text")
        tags = tuple(_read_tag(prompt, match) for match in _TAG.finditer(prompt))
        text = _TAG.sub("", prompt)
        if (opened := _OPENED.search(text)) is not None:
            fail(prompt, prompt.index(opened[0]), "not a tag; expected <lora:NAME:WEIGHT>")
        return cls(" ".join(text.split()) if tags else prompt, tags)

    def __str__(self) -> str:
        return " ".join([*([self.text] if self.text else []), *map(str, self.tags)])


def refuse_tags(prompt: str, why: str) -> None:
    """Refuse a prompt with a tag where none can act, so that it is not read as words.

    Raises:
        PromptError: it has one; ``why`` is the end of the sentence.
    """
    if (match := _TAG.search(prompt) or _OPENED.search(prompt)) is not None:
        raise PromptError(f"{prompt!r} holds the tag {match[0]}; {why}")


def _read_tag(text: str, match: re.Match[str]) -> PromptTag:
    kind = match[1]
    if not match[3]:
        fail(text, match.start(), "a tag is not closed; expected '>' after its weight")
    if kind not in ("lora", "lyco"):
        fail(text, match.start(1), f"there is no {kind!r} tag here; expected <lora:NAME:WEIGHT>")
    fields = _field_spans(text, match.start(2), match.end(2))
    start, end = fields[0]
    name = text[start:end]
    if not name or "=" in name:
        fail(text, start, "no adapter's name; expected <lora:NAME:WEIGHT>")
    if "\n" in name:
        fail(text, start, "a name ends with its line; expected <lora:NAME:WEIGHT>")
    return PromptTag(name, *_read_weights(text, fields[1:]))


def _field_spans(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """What lies between the colons of ``text[start:end]``, without the blanks around it."""
    spans = []
    for field in text[start:end].split(":"):
        begin = start + len(field) - len(field.lstrip())
        spans.append((begin, max(begin, start + len(field.rstrip()))))
        start += len(field) + 1
    return spans


def _read_weights(text: str, spans: list[tuple[int, int]]) -> tuple[float, float, str]:
    in_order: list[float] = []
    named: dict[str, float] = {}
    ramp = ""
    for start, end in spans:
        key, equals, _ = text[start:end].partition("=")
        if equals:
            name = _check_key(text, start, key.strip(), named)
            named[name] = _read_weight(text, start + len(key) + 1, end)
        elif "@" in key:
            parse_ramp(text, start, end)
            ramp = _check_alone(text, start, text[start:end], alone=not in_order and not ramp)
        elif len(in_order) == 2 or ramp:
            _refuse_third(text, start)
        else:
            in_order.append(_read_weight(text, start, end))
    if ramp and not {"te", "unet"}.isdisjoint(named):
        fail(text, spans[0][0], "weights over the steps are those of all parts; leave out te= and unet=")
    text_encoder = named.get("te", in_order[0] if in_order else 1.0)
    unet = named.get("unet", in_order[1] if len(in_order) > 1 else text_encoder)
    return text_encoder, unet, ramp + _read_window(text, spans, named)


def _check_alone(text: str, start: int, ramp: str, *, alone: bool) -> str:
    if not alone:
        fail(text, start, "weights over the steps stand beside a weight; give one of them")
    return "".join(ramp.split())


def _read_window(text: str, spans: list[tuple[int, int]], named: Mapping[str, float]) -> str:
    """The window that ``start=`` and ``end=`` say, as a reference writes it; empty without either."""
    if {"start", "end"}.isdisjoint(named):
        return ""
    start, end = named.get("start", 0.0), named.get("end", 1.0)
    if not 0 <= start <= end <= 1:
        fail(text, spans[0][0], "start= and end= are shares of the steps in order, from 0 to 1")
    return "" if (start, end) == WHOLE else f"[{write_number(start)}-{write_number(end)}]"


def _read_weight(text: str, start: int, end: int) -> float:
    blanks = len(text[start:end]) - len(text[start:end].lstrip())
    return parse_number(text, start + blanks, end, "a weight, e.g. <lora:NAME:0.8>")


def _check_key(text: str, start: int, key: str, named: Mapping[str, float]) -> str:
    if key == "dyn":
        fail(text, start, f"'dyn=' {_DYNAMIC}")
    if key not in _KEYS:
        fail(text, start, f"{key!r} is nothing that a tag says; expected te=, unet=, start= or end=")
    if key in named:
        fail(text, start, f"{_KEYS[key]} stands twice; give one")
    return key


def _refuse_third(text: str, start: int) -> NoReturn:
    fail(text, start, f"a third number {_DYNAMIC}")
