"""``texforce-hub resize``: an adapter at smaller ranks."""

from dataclasses import asdict
from typing import Annotated

import typer

from texforce_hub.cli import names
from texforce_hub.cli.console import LOUDNESS, put, put_detail, put_json
from texforce_hub.cli.options import (
    RESULT,
    AsJson,
    Device,
    Dialect,
    DoraBase,
    Dtype,
    Energy,
    Force,
    Output,
    Rank,
    Ref,
    TotalRank,
    load_base,
    option,
    refuse_existing,
)
from texforce_hub.cli.summary import read_back
from texforce_hub.cli.table import put_table


def register(app: typer.Typer) -> None:
    """Add ``resize``."""
    app.command("resize")(resize)


def resize(
    adapter: Ref,
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    ratio: Annotated[
        float | None,
        option("--ratio", metavar="X", help="Drop singular values below the largest divided by this.", group=RESULT),
    ] = None,
    max_total_rank: TotalRank = None,
    base: DoraBase = None,
    device: Device = None,
    dtype: Dtype = None,
    dialect: Dialect = "diffusers",
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Give an adapter smaller ranks, and say what share is kept; of each layer with -v."""
    from texforce_hub.device import choose_device
    from texforce_hub.hub.read import open_adapter
    from texforce_hub.hub.write import write_adapter
    from texforce_hub.merge.resize import resize_adapter

    dialect = names.read_dialect(dialect)
    refuse_existing(output, force=force, inside=names.file_in(dialect))
    resized = resize_adapter(
        open_adapter(adapter, device=choose_device(device)),
        rank=rank,
        energy=energy,
        ratio=ratio,
        max_total_rank=max_total_rank,
        base=load_base(base, device="cpu"),
        dtype=dtype,
    )
    path = write_adapter(resized.adapter, output, dialect=dialect)
    if json:
        facts = {"output": str(path), "written": read_back(path).as_dict(), "kept": resized.kept}
        put_json({**facts, "layers": [asdict(layer) for layer in resized.layers]})
        return
    if LOUDNESS.verbose:
        rows = [
            [layer.name, str(layer.before or "–"), str(layer.after or "–"), f"{layer.kept:.2%}", f"{layer.norm:.4g}"]
            for layer in resized.layers
        ]
        put_table(["layer", "rank before", "rank", "kept", "norm"], rows, drop=("norm", "rank before"))
    put(str(read_back(path)))
    put_detail(f"kept {resized.kept:.2%} of the change")
