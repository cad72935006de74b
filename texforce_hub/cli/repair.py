"""``texforce-hub repair``: a pipeline that was saved with live adapters, sound again."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from texforce_hub.cli.console import put


def register(app: typer.Typer) -> None:
    """Add ``repair``."""
    app.command("repair")(repair)


def repair(
    path: Annotated[Path, typer.Argument(help="Pipeline folder that was saved with live adapters.")],
    output: Annotated[Path, typer.Option("--output", help="New folder for the repaired pipeline.")],
    base: Annotated[
        str | None, typer.Option("--base", help="What the adapters were trained on, to see how they lie: as for apply.")
    ] = None,
    reading: Annotated[
        Literal["live", "fused"] | None,
        typer.Option("--reading", help="How the adapters lay when it was saved, if you know."),
    ] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Drop the adapters: the base they were trained on.")] = False,
    portable: Annotated[bool, typer.Option("--portable", help="Readable by transformers 4 as well.")] = False,
) -> None:
    """Rewrite a pipeline spoilt by saving it with live adapters, with what they learnt or without."""
    from texforce_hub.pipelines.repair import repair_pipeline
    from texforce_hub.pipelines.save import save_pipeline

    pipe = repair_pipeline(path, tuned=not drop, base=base, reading=reading)
    put(str(save_pipeline(pipe, output, portable=portable)))
