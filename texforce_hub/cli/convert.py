"""``texforce-hub convert``: adapters from one layout into another."""

from pathlib import Path
from typing import Annotated, Any

import typer

from texforce_hub.cli.console import put, put_json, put_table
from texforce_hub.cli.progress import track
from texforce_hub.errors import FileError


def register(app: typer.Typer) -> None:
    """Add ``convert``."""
    app.command("convert")(convert)


def convert(
    refs: Annotated[list[str], typer.Argument(metavar="REF…", help="Files, folders, catalogue names, Hub ids.")],
    output: Annotated[Path, typer.Option("--output", help="A .safetensors file, or a folder (PEFT: always a folder).")],
    dialect: Annotated[str, typer.Option("--dialect", help="diffusers, kohya or peft.")] = "diffusers",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16, bfloat16 …; default: as it is.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="The alpha of layers that store none; default: their rank.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickles from the Hub too: their tensors, and nothing is run.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Write adapters in another layout; every layer's change is kept. A folder is converted file by file.

    Example: texforce-hub convert old/adapter_model.bin --dialect kohya --output new.safetensors
    """
    from texforce_hub.convert import convert_adapter, convert_all, plan_conversions
    from texforce_hub.locate import find_files

    options: dict[str, Any] = {"dialect": dialect, "dtype": dtype, "alpha": alpha, "allow_pickle": allow_pickle}
    if len(refs) == 1 and (output.suffix == ".safetensors" or len(find_files(refs[0])) == 1):
        written = convert_adapter(refs[0], output, **options)
        put_json({"files": [{"source": refs[0], "output": str(written), "error": None}]}) if json else put(str(written))
        return
    pairs = plan_conversions(refs, output, dialect)
    conversions = convert_all(pairs, **options)
    done = list(track(conversions, total=len(pairs), what="converting"))
    rows = [[str(one.source), one.error or str(one.output)] for one in done]
    if json:
        put_json({"files": [{"source": str(d.source), "output": str(d.output), "error": d.error} for d in done]})
    else:
        put_table(["from", "to"], rows)
    failed = sum(one.error is not None for one in done)
    if failed:
        raise FileError(f"{failed} of {len(done)} files could not be converted; the table says why")
