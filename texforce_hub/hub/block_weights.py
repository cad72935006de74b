"""Weights as ``diffusers``' ``set_adapters`` takes them, a number for each attention of a U-Net."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from texforce_hub.errors import ConfigError

_USUAL = {"down": 2, "up": 3}
"""How many attentions a block of a published U-Net has: it may have more than an adapter changes."""
_IN_BLOCK = re.compile(r"unet\.(down|up)_blocks\.(\d+)\.(attentions|resnets|downsamplers|upsamplers)\.(\d+)(?:\.|$)")
_SHAPE = "expected e.g. {'unet': {'down': 0.5, 'mid': 1, 'up': {'block_0': [0.2, 0.8, 0.5]}}}"


def is_number(value: Any) -> bool:
    """Whether it is a finite number; truth values are none."""
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def numbers_in(weight: Any) -> Iterator[Any]:
    """What stands where numbers are expected in a weight: itself, or the leaves of a mapping."""
    if isinstance(weight, Mapping):
        for value in weight.values():
            yield from numbers_in(value)
    elif isinstance(weight, list | tuple):
        yield from weight
    else:
        yield weight


def flatten_blocks(weights: Mapping[str, Any], layers: Iterable[str]) -> dict[str, float]:
    """A number for each part, block or pattern, where ``weights`` may hold a mapping of a U-Net's blocks.

    ``{"unet": {"down": 0.5, "up": {"block_0": [0.2, 0.8, 0.5]}}}`` means what it means in ``diffusers``: a number is
    for each attention of the block in turn, and for the resnet of the same number; the first is for the samplers, too.
    What is not named has weight 1, and so has what lies in blocks without attentions. ``layers`` are the adapter's.

    Raises:
        ConfigError: a part without such blocks, an unknown block, or another number of weights than attentions.
    """
    flat: dict[str, float] = {}
    for part, weight in weights.items():
        if not isinstance(weight, Mapping):
            flat[part] = weight
        elif part == "unet":
            flat |= _flatten_unet(weight, list(layers))
        else:
            raise ConfigError(f"weights by block of {part!r}: only a U-Net has them; give it one number, or a pattern")
    return flat


def _flatten_unet(weights: Mapping[str, Any], layers: Sequence[str]) -> dict[str, float]:
    if unknown := [name for name in weights if name not in ("down", "mid", "up")]:
        raise ConfigError(f"no blocks {unknown[0]!r} in a U-Net's weights; {_SHAPE}")
    flat: dict[str, float] = {}
    if "mid" in weights:
        (flat["unet.mid_block.attentions.0"],) = _spread(weights["mid"], 1, 1, "mid")
    for side in ("down", "up"):
        if side in weights:
            flat |= _flatten_side(side, weights[side], layers)
    return flat


def _flatten_side(side: str, weights: Any, layers: Sequence[str]) -> dict[str, float]:
    matches = [match for name in layers if (match := _IN_BLOCK.match(name)) and match[1] == side]
    counts: dict[str, int] = {}
    for _, block, kind, index in (match.groups() for match in matches):
        if kind == "attentions":
            counts[block] = max(counts.get(block, 0), int(index) + 1)
    if not counts:
        raise ConfigError(f"weights of {side!r}: the adapter changes no attention there; leave them out")
    by_block = weights if isinstance(weights, Mapping) else {f"block_{block}": weights for block in counts}
    if unknown := [block for block in by_block if str(block).removeprefix("block_") not in counts]:
        known = ", ".join(f"block_{block}" for block in sorted(counts, key=int))
        raise ConfigError(f"weights of {side}.{unknown[0]}: the adapter changes attentions of {known} there")
    flat: dict[str, float] = {}
    for block, weight in by_block.items():
        number = block.removeprefix("block_")
        spread = _spread(weight, counts[number], _USUAL[side], f"{side}.{block}")
        if len(set(spread)) == 1:
            flat[f"unet.{side}_blocks.{number}"] = spread[0]
            continue
        prefixes = {match[0].rstrip("."): match for match in matches if match[2] == number}
        flat |= {
            prefix: spread[int(match[4]) if match[3] in ("attentions", "resnets") else 0]
            for prefix, match in prefixes.items()
            if match[3] == "attentions" or int(match[4]) < len(spread)
        }
    return flat


def _spread(weight: Any, count: int, usual: int, where: str) -> list[float]:
    """A weight for each of ``count`` attentions, or of the ``usual`` number where that is more."""
    given = list(weight) if isinstance(weight, list | tuple) else [weight]
    if not all(isinstance(number, Real) for number in given):
        raise ConfigError(f"weights of {where}: {weight!r:.80}; {_SHAPE}")
    if len(given) == 1:
        return given * max(count, usual)
    if not count <= len(given) <= max(count, usual):
        raise ConfigError(
            f"{len(given)} weights of {where}, where the adapter changes {count} attentions; give one each"
        )
    return given
