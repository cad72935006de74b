"""Alpha, wherever a file keeps it, and the scale it makes of a rank."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from texforce_hub.errors import DialectError
from texforce_hub.families.names import PARTS, part_of, path_of, publish, unwrap
from texforce_hub.families.recognition import read_collated
from texforce_hub.files.header import Header
from texforce_hub.formats.plan.patterns import Patterns, read_patterns

ABSURD = 100.0
"""A scale beyond this is reported: nobody trains with it, damaged files have it."""

DEFAULT_ALPHA = 8
"""What PEFT takes for the alpha of a configuration that has none (``LoraConfig``, ``LoHaConfig``, ``LoKrConfig``)."""

_ADAPTERS = frozenset({"r", "lora_alpha", "alpha", "alpha_pattern", "rank_pattern", "peft_type"})
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
class Config:
    """What one PEFT configuration says of alphas and ranks; ``kind`` is its ``peft_type``."""

    alpha: Any
    alphas: Patterns
    rank: Any
    ranks: Patterns
    rooted: Any
    kind: str
    decomposed: Any

    @property
    def is_product(self) -> bool:
        """Whether it is for LoHa or LoKr, whose rank is in no tensor's shape: PEFT divides by its own ``r``."""
        return self.kind in ("LOHA", "LOKR")


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """What a configuration says of one layer: the alpha it states, and its rank; ``None`` where it says nothing."""

    config: Config | None = None
    stated: Any = None
    rank: Any = None

    @property
    def assumes_alpha(self) -> bool:
        """Whether the alpha is PEFT's own, for want of a stated one."""
        return self.config is not None and self.stated is None

    @property
    def alpha(self) -> Any:
        """What counts as the layer's alpha; ``None`` without a configuration."""
        return DEFAULT_ALPHA if self.assumes_alpha else self.stated


@dataclass(frozen=True, slots=True)
class Configs:
    """A file's configurations: PEFT's beside it, and those that ``diffusers`` keeps in its header, by part.

    The part ``None`` is any: ``save_lora_adapter`` saves one model and names none.
    """

    folder: Config | None
    collated: Mapping[str | None, Config]
    layers: int

    def of(self, name: str, stem: str, *, in_folder: bool) -> LayerSettings:
        """What counts for the layer ``name`` that the file spells ``stem``; ``in_folder``: PEFT's config is for it."""
        part, path = part_of(name), path_of(name)
        config = self.folder if in_folder else None
        config = config or self.collated.get(part) or self.collated.get(None)
        if config is None:
            return LayerSettings()
        _, spelled = unwrap(stem.partition(" (")[0])
        path = spelled if publish(part, spelled) == name else path
        stated, rank = config.alphas.find(path, self.layers), config.ranks.find(path, self.layers)
        return LayerSettings(config, config.alpha if stated is None else stated, config.rank if rank is None else rank)


def read_configs(header: Header) -> Configs:
    """PEFT's config beside the file, and those in its header.

    Raises:
        DialectError: one of them cannot be what it should be.
    """
    collated = _by_part(read_collated(header.metadata.get("lora_adapter_metadata", "")))
    return Configs(
        _read_config(header.config) if header.config else None,
        {part: _read_config(config) for part, config in collated.items() if _ADAPTERS & config.keys()},
        len(header.tensors),
    )


def find_alpha(name: str, stored: float | None, settings: LayerSettings) -> Alpha:
    """The layer's alpha: its own tensor, PEFT's config, ``diffusers``' header, in this order.

    Raises:
        DialectError: what is written there is no number; guessing another scale would be a silent loss.
    """
    if stored is not None:
        return Alpha(stored)
    return Alpha(None) if settings.config is None else _read_alpha(name, settings.alpha, settings.config, settings.rank)


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


def _read_config(config: Mapping[str, Any]) -> Config:
    rank = config.get("r")
    if rank is not None and (type(rank) is not int or rank < 0):
        raise DialectError(f"r, the rank, is {rank!r:.80}; expected a whole number from 1: fix the configuration")
    if any(key in config and config[key] is None for key in ("lora_alpha", "alpha")):
        raise DialectError("lora_alpha is null; expected a number: fix the configuration")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise DialectError(
            f"init_lora_weights is {start!r:.40}: training began by changing the base's weights, which the file does "
            "not hold; let PEFT convert it (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return Config(
        alpha=config.get("lora_alpha", config.get("alpha")),
        alphas=read_patterns(config.get("alpha_pattern")),
        rank=rank,
        ranks=read_patterns(config.get("rank_pattern")),
        rooted=config.get("use_rslora", False),
        kind=str(config.get("peft_type") or "LORA"),
        decomposed=config.get("use_dora"),
    )


def _read_alpha(name: str, value: Any, config: Config, rank: Any) -> Alpha:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise DialectError(f"lora_alpha of {name} is {value!r:.80}; expected a number: fix the configuration")
    if not isinstance(config.rooted, (bool, NoneType)):
        raise DialectError(f"use_rslora is {config.rooted!r:.80}; expected true or false: fix the configuration")
    rank = rank if config.is_product else None
    if rank is not None and (type(rank) is not int or rank < 1):
        raise DialectError(f"the rank of {name} is {rank!r:.80}; expected a whole number from 1: fix it")
    return Alpha(_as_float(value), bool(config.rooted), rank)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON's whole numbers have no limit
        return math.inf
