"""``texforce-hub compare``: how alike two adapters are."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from texforce_hub.cli import names
from texforce_hub.cli.console import LOUDNESS, put, put_detail, put_json
from texforce_hub.cli.options import (
    RESULT,
    AsJson,
    Device,
    DoraBase,
    Force,
    load_base,
    option,
    refuse_existing,
    refuse_suffix,
)
from texforce_hub.cli.summary import by_part, count_of
from texforce_hub.cli.table import put_table

if TYPE_CHECKING:
    from texforce_hub.merge.compare import ComparedLayer, Comparison

_MEANING = (
    "cosine: 1 the same direction, 0 unrelated, -1 opposite; overlap: share of what the second writes to that the "
    "first writes to as well; interference: share of the strength that adding both loses (below 0: gains)"
)


def register(app: typer.Typer) -> None:
    """Add ``compare``."""
    app.command("compare")(compare)


def compare(
    first: Annotated[str, typer.Argument(metavar="FIRST", help="PATH, name or Hub id.", autocompletion=names.refs)],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="PATH, name or Hub id.", autocompletion=names.refs)],
    output: Annotated[
        Path | None, option("--output", "-o", metavar="PNG", help="Heat map of all layers.", group=RESULT)
    ] = None,
    base: DoraBase = None,
    device: Device = None,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Compare two adapters: cosine, principal angles and interference of every layer; -v prints them all."""
    from texforce_hub.device import choose_device
    from texforce_hub.merge.compare import compare_adapters

    if output is not None:
        refuse_suffix(output, (".png",))
        refuse_existing(output, force=force)
    chosen = choose_device(device)
    comparison = compare_adapters(first, second, base=load_base(base, device=chosen), device=chosen)
    if output is not None:
        _draw(comparison, output, f"{first} and {second}")
    if json:
        put_json(comparison.as_dict())
    else:
        _print(comparison)
        if output is not None:
            put(str(output))


def _print(comparison: "Comparison") -> None:
    if LOUDNESS.verbose:
        columns = ["layer", "cosine", "overlap", "interference", "norms", "angles in, out"]
        put_table(columns, [_row(layer) for layer in comparison.layers], drop=("angles in, out", "norms"))
    else:
        columns = ["part", "layers", "cosine", "overlap", "interference"]
        put_table(columns, [_part_row(part, layers) for part, layers in _by_part(comparison.layers).items()])
    put_detail(_MEANING)
    for missing, which in zip(comparison.missing, ("first", "second")):
        if missing:
            put_detail(f"only in the {which}: {count_of(len(missing), 'layer')} ({by_part(missing)})")
    count = count_of(len(comparison.layers), "layer")
    put(f"cosine {comparison.cosine:+.3f}, interference {comparison.interference:+.3f} over {count}")


def _row(layer: "ComparedLayer") -> list[str]:
    return [
        layer.name,
        f"{layer.cosine:+.3f}",
        f"{layer.overlap:.2f}",
        f"{layer.interference:+.3f}",
        f"{layer.norms[0]:.3g} {layer.norms[1]:.3g}",
        f"{layer.angles[0]:.0f}° {layer.angles[1]:.0f}°",
    ]


def _by_part(layers: "Sequence[ComparedLayer]") -> "dict[str, list[ComparedLayer]]":
    parts: dict[str, list[ComparedLayer]] = {}
    for layer in layers:
        parts.setdefault(layer.name.partition(".")[0], []).append(layer)
    return parts


def _part_row(part: str, layers: "Sequence[ComparedLayer]") -> list[str]:
    """Lowest and highest of each number over a part's layers."""
    numbers = ([getattr(layer, name) for layer in layers] for name in ("cosine", "overlap", "interference"))
    return [part, str(len(layers)), *(f"{min(n):+.2f} to {max(n):+.2f}" for n in numbers)]


def _draw(comparison: "Comparison", output: Path, title: str) -> None:
    from texforce_hub.files.writing import writing
    from texforce_hub.generate.images.heatmap import draw_comparison

    rows = {layer.name: (layer.cosine, layer.overlap, layer.interference) for layer in comparison.layers}
    picture = draw_comparison(rows, title=title)
    with writing(output) as part:
        picture.save(part, format="PNG")
