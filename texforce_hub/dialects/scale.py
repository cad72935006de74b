"""Alpha, wherever a file keeps it, and the scale it makes of a rank."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from texforce_hub.dialects.recognition import read_collated
from texforce_hub.errors import DialectError
from texforce_hub.header import Header

ABSURD = 100.0
"""A scale beyond this is reported: nobody trains with it, damaged files have it."""


@dataclass(frozen=True, slots=True)
class Alpha:
    """The alpha of one layer; ``None`` where the file stores none, which means alpha = rank.

    ``rooted`` is rsLoRA's rule, scale = alpha / √rank (arXiv 2312.03732).
    """

    value: float | None
    rooted: bool = False
    rank: int | None = None

    def scale(self, rank: int | None) -> float:
        """What the halves' product is multiplied by."""
        divisor = self.rank or rank
        if self.value is None or not divisor:
            return 1.0
        return self.value / (math.sqrt(divisor) if self.rooted else divisor)


def find_alpha(name: str, stored: float | None, header: Header) -> Alpha:
    """The layer's alpha: its own tensor, PEFT's config, ``diffusers``' header, in this order."""
    if stored is not None:
        return Alpha(stored)
    part, _, path = name.partition(".")
    for config in (header.config, _config_of(part, header)):
        if config:
            found = _from_config(path, config)
            if found.value is not None:
                return found
    return Alpha(None)


def _config_of(part: str, header: Header) -> Mapping[str, Any]:
    collated = read_collated(header.metadata.get("lora_adapter_metadata", ""))
    return {key[len(part) + 1 :]: value for key, value in collated.items() if key.startswith(f"{part}.")}


def _from_config(path: str, config: Mapping[str, Any]) -> Alpha:
    """PEFT's rule: a pattern that ends the module's name overrides the general alpha.

    Raises:
        DialectError: what is written there is no number; guessing another scale would be a silent loss.
    """
    value = _patterned(path, config.get("alpha_pattern"), config.get("lora_alpha", config.get("alpha")))
    if value is None:
        return Alpha(None)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise DialectError(f"lora_alpha of {path} is {value!r}; expected a number: mend the configuration")
    rooted = config.get("use_rslora", False)
    if not isinstance(rooted, (bool, NoneType)):
        raise DialectError(f"use_rslora is {rooted!r}; expected true or false: mend the configuration")
    rank = None
    if config.get("peft_type") in ("LOHA", "LOKR"):  # the rank of a product says nothing: PEFT divides by its own r
        rank = _patterned(path, config.get("rank_pattern"), config.get("r"))
    return Alpha(_as_float(value), bool(rooted), rank if isinstance(rank, int) else None)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON's whole numbers have no limit
        return math.inf


def _patterned(path: str, patterns: Any, otherwise: Any) -> Any:
    if not isinstance(patterns, (dict, NoneType)):
        raise DialectError(f"a rank or alpha pattern is {patterns!r}; expected an object of patterns and numbers")
    for pattern, value in (patterns or {}).items():
        flat = str(pattern).removeprefix("^").removeprefix("text_model.")
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", path) or re.fullmatch(rf"(.*\.)?({flat})", path):
                return value
        except re.error as error:
            raise DialectError(f"pattern {pattern!r} is no regular expression ({error}); mend it") from error
    return otherwise
