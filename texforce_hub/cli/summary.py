"""Long results in a few lines: layers by part, reasons by how many they concern, what a written file holds."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from texforce_hub.cli.console import LOUDNESS
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


@dataclass(frozen=True, slots=True)
class Written:
    """What a file that was just written holds, read back from its header, and who reads all of it exactly.

    ``readers`` is ``None`` where it is not known who: the layers fit no base that we know.
    """

    path: Path
    layers: int
    ranks: tuple[int, ...]
    size: int
    layouts: tuple[str, ...]
    readers: tuple[str, ...] | None

    @property
    def read_by(self) -> str:
        """``A1111, ComfyUI, Forge``, ``texforce-hub only``, or that it is not known."""
        if self.readers is None:
            return "whoever reads its base, which is none we know"
        return ", ".join(self.readers) or "texforce-hub only"

    def __str__(self) -> str:
        """``both.safetensors: 12 layers, rank 16, 0.21 MB, kohya layout; read whole by A1111, ComfyUI, Forge``."""
        if LOUDNESS.quiet:
            return str(self.path)
        facts = [count_of(self.layers, "layer"), *([f"rank {span(self.ranks)}"] if self.ranks else [])]
        facts += [f"{self.size / 1e6:.2f} MB", f"{', '.join(self.layouts)} layout"]
        return f"{self.path}: {', '.join(facts)}; read whole by {self.read_by}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {key: value for key, value in asdict(self).items() if key != "path"}


def read_back(path: Path) -> Written:
    """The facts of what was just written."""
    from texforce_hub.formats.codec.fitting import list_readers
    from texforce_hub.hub.find import find_bundle
    from texforce_hub.hub.inspect import inspect_file
    from texforce_hub.hub.read import open_adapter

    bundle = find_bundle(path)
    inspection = inspect_file(bundle, hashed=False)
    outline = open_adapter(bundle).outline
    readers = list_readers(outline, inspection.dialects) if outline.family_verdict.candidates else None
    ranks = tuple(sorted(rank for rank in inspection.ranks if rank is not None))
    return Written(path, inspection.layers, ranks, inspection.size, inspection.dialects, readers)
