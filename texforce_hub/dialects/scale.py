"""Alpha, wherever a file keeps it, and the scale it makes of a rank."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from texforce_hub.dialects.paths import PARTS
from texforce_hub.dialects.patterns import Patterns, read_patterns
from texforce_hub.dialects.recognition import read_collated
from texforce_hub.errors import DialectError
from texforce_hub.header import Header

ABSURD = 100.0
"""A scale beyond this is reported: nobody trains with it, damaged files have it."""

_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # PEFT's initialisations that do


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


@dataclass(frozen=True, slots=True)
class _Config:
    """What one PEFT configuration says of alphas and ranks."""

    alpha: Any
    alphas: Patterns
    rank: Any
    ranks: Patterns
    rooted: Any
    product: bool


@dataclass(frozen=True, slots=True)
class Settings:
    """A file's configurations in the order in which they count, each with the part it is for (``None``: any)."""

    configs: tuple[tuple[str | None, _Config], ...]
    layers: int


def read_settings(header: Header) -> Settings:
    """PEFT's config beside the file, and those that ``diffusers`` keeps in its header, by part or for the one it has.

    Raises:
        DialectError: one of them cannot be what it should be.
    """
    found: list[tuple[str | None, _Config]] = []
    if header.config:
        found.append((None, _read_config(header.config)))
    collated = read_collated(header.metadata.get("lora_adapter_metadata", ""))
    for part, config in _by_part(collated).items():
        found.append((part, _read_config(config)))
    return Settings(tuple(found), len(header.tensors))


def find_alpha(name: str, stored: float | None, settings: Settings) -> Alpha:
    """The layer's alpha: its own tensor, PEFT's config, ``diffusers``' header, in this order.

    Raises:
        DialectError: what is written there is no number; guessing another scale would be a silent loss.
    """
    if stored is not None:
        return Alpha(stored)
    part, _, path = name.partition(".")
    for whose, config in settings.configs:
        if whose in (None, part):
            value = _patterned(path, config.alphas, config.alpha, settings.layers)
            if value is not None:
                return _read_alpha(path, value, config, settings.layers)
    return Alpha(None)


def _by_part(collated: Mapping[str, Any]) -> dict[str | None, dict[str, Any]]:
    """``text_encoder.r`` → ``r`` of the text encoder; ``save_lora_adapter`` saves one model and names no part."""
    configs: dict[str | None, dict[str, Any]] = {}
    for key, value in collated.items():
        part, _, option = key.partition(".")
        if key in PARTS:
            raise DialectError(
                f"lora_adapter_metadata holds {key!r} as a {type(value).__name__}; expected '{key}.lora_alpha' …"
            )
        whose, option = (part, option) if part in PARTS else (None, key)
        configs.setdefault(whose, {})[option] = value
    return configs


def _read_config(config: Mapping[str, Any]) -> _Config:
    rank = config.get("r")
    if rank is not None and (type(rank) is not int or rank < 0):
        raise DialectError(f"r, the rank, is {rank!r:.80}; expected a whole number from 1: mend the configuration")
    if any(key in config and config[key] is None for key in ("lora_alpha", "alpha")):
        raise DialectError("lora_alpha is null; expected a number: mend the configuration")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise DialectError(
            f"init_lora_weights is {start!r:.40}: training began by changing the base's weights, which the file does "
            "not hold; let PEFT convert it (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return _Config(
        alpha=config.get("lora_alpha", config.get("alpha")),
        alphas=read_patterns(config.get("alpha_pattern")),
        rank=rank,
        ranks=read_patterns(config.get("rank_pattern")),
        rooted=config.get("use_rslora", False),
        product=config.get("peft_type") in ("LOHA", "LOKR"),
    )


def _read_alpha(path: str, value: Any, config: _Config, layers: int) -> Alpha:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise DialectError(f"lora_alpha of {path} is {value!r:.80}; expected a number: mend the configuration")
    if not isinstance(config.rooted, (bool, NoneType)):
        raise DialectError(f"use_rslora is {config.rooted!r:.80}; expected true or false: mend the configuration")
    rank = None
    if config.product:  # the rank of a product says nothing: PEFT divides by its own r
        rank = _patterned(path, config.ranks, config.rank, layers)
        if rank is not None and (type(rank) is not int or rank < 1):
            raise DialectError(f"the rank of {path} is {rank!r:.80}; expected a whole number from 1: mend it")
    return Alpha(_as_float(value), bool(config.rooted), rank)


def _patterned(path: str, patterns: Patterns, otherwise: Any, layers: int) -> Any:
    """PEFT's rule: a pattern that ends the module's name overrides the general value."""
    found = patterns.find(path, layers)
    return otherwise if found is None else found


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON's whole numbers have no limit
        return math.inf
