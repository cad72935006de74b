"""``texforce-hub compare``: how alike two adapters are."""

from pathlib import Path
from typing import Annotated

import typer

from texforce_hub.cli.console import put, put_json, put_table
from texforce_hub.cli.options import load_base


def register(app: typer.Typer) -> None:
    """Add ``compare``."""
    app.command("compare")(compare)


def compare(
    first: Annotated[str, typer.Argument(help="PATH, name or Hub id.")],
    second: Annotated[str, typer.Argument(help="PATH, name or Hub id.")],
    output: Annotated[Path | None, typer.Option("--output", help="A .png for the heat map of all layers.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Needed only by DoRA layers.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Default: CUDA if present.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two adapters: cosine, principal angles and interference of every layer."""
    from texforce_hub.device import choose_device
    from texforce_hub.hub.read import open_adapter
    from texforce_hub.merge.compare import compare_adapters

    chosen = choose_device(device)
    comparison = compare_adapters(
        open_adapter(first, device=chosen),
        open_adapter(second, device=chosen),
        base=load_base(base, device=chosen),
    )
    if json:
        put_json(comparison.as_dict())
    else:
        rows = [
            [
                layer.name,
                f"{layer.norms[0]:.3g} {layer.norms[1]:.3g}",
                f"{layer.cosine:+.3f}",
                f"{layer.angles[0]:.0f}° {layer.angles[1]:.0f}°",
                f"{layer.overlap:.2f}",
                f"{layer.interference:+.3f}",
            ]
            for layer in comparison.layers
        ]
        put_table(["layer", "norms", "cosine", "angles in, out", "overlap", "interference"], rows)
        count = len(comparison.layers)
        put(f"cosine {comparison.cosine:+.3f}, interference {comparison.interference:+.3f} over {count} layers; ")
        put(f"only in the first: {len(comparison.missing[0])}, only in the second: {len(comparison.missing[1])}")
    if output is not None:
        from texforce_hub.files.writing import writing
        from texforce_hub.generate.images.heatmap import draw_heatmap

        values = [[layer.cosine, layer.overlap, layer.interference] for layer in comparison.layers]
        names = [layer.name for layer in comparison.layers]
        picture = draw_heatmap(values, rows=names, columns=["cosine", "overlap", "interference"])
        with writing(output) as part:
            picture.save(part, format="PNG")
