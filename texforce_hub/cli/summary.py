"""Long results in a few lines: layers by part, reasons by how many they concern, what a written file holds."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from texforce_hub.families.names import part_of

MOST = 8
"""Lines of one kind in a summary."""


def by_reason(reasons: Mapping[str, str], *, most: int = MOST) -> list[str]:
    """``128 layers: the base has no text_encoder_2``, the commonest first, and how many reasons there are beyond."""
    counted = Counter(reasons.values()).most_common()
    lines = [
        f"{count_of(count, 'layer')}: {reason}" + (f" ({_first(reasons, reason)})" if count == 1 else "")
        for reason, count in counted[:most]
    ]
    rest = sum(count for _, count in counted[most:])
    return lines + (
        [f"{count_of(rest, 'layer')} for {len(counted) - most} other reasons; -v names all"] if rest else []
    )


def _first(reasons: Mapping[str, str], reason: str) -> str:
    return next(name for name, other in reasons.items() if other == reason)


def by_part(names: Iterable[str]) -> str:
    """``text_encoder 12, unet 32``: how many layers each part has."""
    return ", ".join(f"{part} {count}" for part, count in Counter(map(part_of, names)).items())


def count_of(number: int, noun: str) -> str:
    """``1 layer``, ``12 layers``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def span(values: Sequence[int]) -> str:
    """``8``, or ``4 to 32``."""
    return "" if not values else str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def written(path: Path) -> str:
    """What was just written, read back from its header: ``both.safetensors: 12 layers, rank 16, 0.21 MB, kohya``."""
    from texforce_hub.hub.find import find_bundle
    from texforce_hub.hub.inspect import inspect_file

    inspection = inspect_file(find_bundle(path), hashed=False)
    ranks = [rank for rank in inspection.ranks if rank is not None]
    facts = [count_of(sum(inspection.parts.values()), "layer")]
    facts += [f"rank {span(ranks)}"] if ranks else []
    facts += [f"{inspection.size / 1e6:.2f} MB", f"{', '.join(inspection.dialects)} layout"]
    return f"{path}: {', '.join(facts)}"
