"""``texforce-hub repair``: a pipeline that was saved with live adapters, sound again."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from texforce_hub.cli import names
from texforce_hub.cli.console import put
from texforce_hub.cli.options import RESULT, Force, Output, option, refuse_existing

READ = "How it is read"


def register(app: typer.Typer) -> None:
    """Add ``repair``."""
    app.command("repair")(repair)


def repair(
    path: Annotated[Path, typer.Argument(metavar="FOLDER", help="Pipeline that was saved with live adapters.")],
    output: Output,
    base: Annotated[
        str | None,
        option("--base", metavar="BASE", help="What the adapters were trained on, to see how they lie.", group=READ,
               autocompletion=names.bases),
    ] = None,
    reading: Annotated[
        Literal["live", "fused"] | None,
        option("--reading", metavar="HOW", help="How they lay when it was saved: live or fused.", group=READ),
    ] = None,
    drop: Annotated[
        bool, option("--drop", help="Drop the adapters: the base they were trained on.", group=RESULT)
    ] = False,
    portable: Annotated[bool, option("--portable", help="Readable by transformers 4 as well.", group=RESULT)] = False,
    force: Force = False,
) -> None:  # fmt: skip
    """Rewrite a pipeline spoilt by saving it with live adapters, with what they learnt or without."""
    from texforce_hub.pipelines.repair import repair_pipeline
    from texforce_hub.pipelines.save import save_pipeline

    refuse_existing(output, force=force)
    pipe = repair_pipeline(path, tuned=not drop, base=base, reading=reading)
    put(str(save_pipeline(pipe, output, portable=portable)))
