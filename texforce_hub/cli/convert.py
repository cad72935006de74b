"""``texforce-hub convert``: adapters from one layout into another."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli.console import put, put_json, put_table, say
from texforce_hub.cli.progress import track
from texforce_hub.errors import ConfigError, FileError

if TYPE_CHECKING:
    from texforce_hub.hub.convert import Conversion


def register(app: typer.Typer) -> None:
    """Add ``convert``."""
    app.command("convert")(convert)


def convert(
    refs: Annotated[list[str], typer.Argument(metavar="REF…", help="Files, folders, catalogue names, Hub ids.")],
    output: Annotated[Path, typer.Option("--output", help="A .safetensors file, or a folder (PEFT: always a folder).")],
    dialect: Annotated[str | None, typer.Option("--dialect", help="diffusers (default), kohya or peft.")] = None,
    reader: Annotated[
        str | None, typer.Option("--for", help="Who must read it exactly: a1111, comfyui, forge, diffusers or peft.")
    ] = None,
    family: Annotated[
        str | None, typer.Option("--family", help="The base meant, where the layers fit several, e.g. sdxl.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16, bfloat16 …; default: as it is.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="The alpha of layers that store none; default: their rank.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickles from the Hub too: their tensors, and nothing is run.")
    ] = False,
    no_sidecars: Annotated[
        bool, typer.Option("--no-sidecars", help="Leave the texts, facts and previews beside a file where they are.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Write adapters in another layout; every layer's change is kept, to the dtype's rounding.

    A folder is converted file by file.

    --for PROGRAM writes what that program reads exactly, or says why it cannot.

    A reference's weight (mine.safetensors:0.5, or mine:text_encoder=0.5,unet=1) goes into the file.

    What lies beside a file is copied along (NAME.json, .civitai.info, .metadata.json, .cm-info.json, .txt, previews);
    nothing is written over.

    Example: texforce-hub convert old/adapter_model.bin --dialect kohya --output new.safetensors
    """
    from texforce_hub.formats.readers import find_reader
    from texforce_hub.hub.convert import Job, convert_all, parse_weights, plan_conversions
    from texforce_hub.hub.filenames import is_safetensors
    from texforce_hub.hub.find import find_bundle, find_bundles

    if dialect is not None and reader is not None:
        raise ConfigError("--for chooses the layout; give it or --dialect, not both")
    dialect = dialect or (find_reader(reader).layouts[0] if reader else "diffusers")
    alone = len(refs) == 1 and (is_safetensors(output.name) or len(find_bundles(refs[0])) == 1)
    lone = [Job(find_bundle(refs[0]), output, parse_weights(refs[0]))] if alone else None
    jobs = lone or plan_conversions(refs, output, dialect)
    options: dict[str, Any] = {
        "dialect": dialect,
        "reader": reader,
        "family": family,
        "dtype": dtype,
        "alpha": alpha,
        "allow_pickle": allow_pickle,
    }
    conversions = convert_all(jobs, **options, sidecars=not no_sidecars)
    done = list(track(conversions, total=len(jobs), what="converting"))
    if alone and done[0].error is not None:
        raise FileError(done[0].error)
    if json:
        put_json({"files": [_as_dict(conversion) for conversion in done]})
    elif alone:
        put(str(done[0].output))
    else:
        put_table(
            ["from", "to"],
            [[str(conversion.source), conversion.error or str(conversion.output)] for conversion in done],
        )
    for note in _gathered(note for conversion in done for note in conversion.notes):
        say(f"note: {note}")
    failed = sum(conversion.error is not None for conversion in done)
    if failed:
        raise FileError(f"{failed} of {len(done)} files could not be converted; the table says why")


def _gathered(notes: Iterable[str]) -> Iterator[str]:
    """Each ``FILE: what there is to say`` once, with the first file of which it is said and how many more there are."""
    files: dict[str, list[str]] = {}
    for note in notes:
        file, _, text = note.partition(": ")
        files.setdefault(text, []).append(file)
    for text, named in files.items():
        more = f" (and of {len(named) - 1} more files)" if len(named) > 1 else ""
        yield f"{named[0]}: {text}{more}"


def _as_dict(conversion: "Conversion") -> dict[str, Any]:
    values = {"source": str(conversion.source), "output": str(conversion.output), "error": conversion.error}
    return values | {"notes": list(conversion.notes)}
