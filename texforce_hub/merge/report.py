"""What a merge did: per layer norms, ranks and the share kept; how alike its sources were; what was odd."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from texforce_hub.adapter.value import LayerName
from texforce_hub.families.names import part_of
from texforce_hub.notebook import Bar, Cell, table


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One merged layer.

    kind: of the result, ``LowRank``, ``Dense`` or ``Vector``
    rank: of the result; ``None`` where it has none
    norm: Frobenius norm of the result before it was truncated
    kept: share of its squared norm that truncation kept, in [0, 1]
    sources: the rank of each source's layer, ``None`` for a dense one, 0 where the source lacks it
    """

    name: LayerName
    kind: str
    rank: int | None
    norm: float
    kept: float
    sources: tuple[int | None, ...]


def kept_share(layers: Sequence[LayerReport]) -> float:
    """The share of all layers' squared norms together that was kept."""
    total = math.fsum(layer.norm**2 for layer in layers)
    return math.fsum(layer.kept * layer.norm**2 for layer in layers) / total if total > 0 else 1.0


@dataclass(frozen=True, slots=True, repr=False)
class MergeReport:
    """The whole merge.

    labels: the sources, in order
    cosines: between the sources' changes, over the layers that both have
    removed: layers in which the sources cancelled, absent from the result
    """

    method: str
    labels: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    cosines: tuple[tuple[float, ...], ...]
    removed: tuple[LayerName, ...] = ()
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shown = ", ".join(self.labels[:4]) + (f" and {len(self.labels) - 4} more" if len(self.labels) > 4 else "")
        said = [f"{self.kept:.1%} kept", *([f"{len(self.removed)} cancelled"] if self.removed else [])]
        return f"MergeReport({self.method} of {shown}: {len(self.layers)} layers, {', '.join(said)})"

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole result before truncation."""
        return math.sqrt(math.fsum(layer.norm**2 for layer in self.layers))

    @property
    def kept(self) -> float:
        """Share of the whole result's squared norm that truncation kept; the rest was discarded."""
        return kept_share(self.layers)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return {**asdict(self), "norm": self.norm, "kept": self.kept}

    def _repr_html_(self) -> str:
        """A notebook's table: a row for each part, with a bar of the share of its squared norm that was kept."""
        parts: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            parts.setdefault(part_of(layer.name), []).append(layer)
        rows: list[tuple[Cell, ...]] = []
        for part, layers in parts.items():
            norm, kept = math.sqrt(math.fsum(layer.norm**2 for layer in layers)), kept_share(layers)
            rows.append((part, str(len(layers)), f"{norm:.4g}", Bar(f"{kept:.2%}", kept)))
        return table(f"{self.method} of {', '.join(self.labels)}", ("part", "layers", "norm", "kept"), rows)

    def rows(self) -> list[list[str]]:
        """One row a layer for a table: name, kind, rank, the sources' ranks, norm, kept share."""
        return [
            [
                layer.name,
                layer.kind,
                _written(layer.rank),
                " ".join(_written(rank) for rank in layer.sources),
                f"{layer.norm:.4g}",
                f"{layer.kept:.2%}",
            ]
            for layer in self.layers
        ]


COLUMNS = ["layer", "kind", "rank", "source ranks", "norm", "kept"]


def _written(rank: int | None) -> str:
    return "–" if rank is None else str(rank)
