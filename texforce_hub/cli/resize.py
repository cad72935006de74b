"""``texforce-hub resize``: an adapter at smaller ranks."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from texforce_hub.cli.console import put, put_json, put_table
from texforce_hub.cli.options import load_base


def register(app: typer.Typer) -> None:
    """Add ``resize``."""
    app.command("resize")(resize)


def resize(
    adapter: Annotated[str, typer.Argument(help="PATH, name or Hub id.")],
    output: Annotated[Path, typer.Option("--output", help="File or folder for the result.")],
    rank: Annotated[int | None, typer.Option("--rank", help="Largest rank of a layer.")] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Share to keep of each layer, e.g. 0.99.")] = None,
    ratio: Annotated[
        float | None, typer.Option("--ratio", help="Drop singular values below the largest divided by this.")
    ] = None,
    max_total_rank: Annotated[
        int | None, typer.Option("--max-total-rank", help="Sum of all ranks, spent where it keeps most.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Needed only by DoRA layers.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Default: CUDA if present.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32 (default), float16 or bfloat16.")] = None,
    dialect: Annotated[str, typer.Option("--dialect", help="Layout of the result.")] = "diffusers",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Give an adapter smaller ranks, and say what share is kept."""
    from texforce_hub.device import choose_device, choose_dtype
    from texforce_hub.hub.read import open_adapter
    from texforce_hub.hub.write import write_adapter
    from texforce_hub.merge.resize import resize_adapter

    resized = resize_adapter(
        open_adapter(adapter, device=choose_device(device)),
        rank=rank,
        energy=energy,
        ratio=ratio,
        max_total_rank=max_total_rank,
        base=load_base(base, device="cpu"),
        dtype=None if dtype is None else choose_dtype(dtype),
    )
    path = write_adapter(resized.adapter, output, dialect=dialect)
    if json:
        put_json({"output": str(path), "kept": resized.kept, "layers": [asdict(layer) for layer in resized.layers]})
        return
    rows = [
        [layer.name, str(layer.before or "–"), str(layer.after or "–"), f"{layer.norm:.4g}", f"{layer.kept:.2%}"]
        for layer in resized.layers
    ]
    put_table(["layer", "rank before", "rank", "norm", "kept"], rows)
    put(f"kept {resized.kept:.2%}; {path}")
