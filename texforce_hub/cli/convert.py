"""``texforce-hub convert``: adapters from one layout into another."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli import names
from texforce_hub.cli.console import LOUDNESS, note, put, put_json
from texforce_hub.cli.options import RESULT, AsJson, Dtype, Force, option, refuse_existing
from texforce_hub.cli.progress import track
from texforce_hub.cli.summary import Written, count_of, read_back, span
from texforce_hub.cli.table import put_table
from texforce_hub.errors import ConfigError, FileError

if TYPE_CHECKING:
    from texforce_hub.hub.convert import Conversion
    from texforce_hub.hub.convert_many import Job

_READING = "How it is read"


def register(app: typer.Typer) -> None:
    """Add ``convert``."""
    app.command("convert")(convert)


def convert(
    refs: Annotated[
        list[str] | None,
        typer.Argument(metavar="REF…", help="Files, folders, names, Hub ids.", autocompletion=names.refs),
    ] = None,
    output: Annotated[
        Path | None,
        option("--output", "-o", metavar="PATH", help="A .safetensors file, or a folder (PEFT: always).", group=RESULT),
    ] = None,
    dialect: Annotated[
        str | None,
        option("--dialect", metavar="NAME", help="diffusers (default), kohya or peft.", group=RESULT,
               autocompletion=names.writable_dialects),
    ] = None,
    reader: Annotated[
        str | None,
        option("--for", metavar="PROGRAM", help="Who must read it exactly: a1111, comfyui, forge, diffusers, peft.",
               group=RESULT, autocompletion=names.readers),
    ] = None,
    family: Annotated[
        str | None,
        option("--family", metavar="NAME", help="The base meant, where the layers fit several, e.g. sdxl.",
               group=RESULT, autocompletion=names.families),
    ] = None,
    dtype: Dtype = None,
    alpha: Annotated[
        float | None,
        option("--alpha", metavar="X", help="Of layers that store no alpha; default: their rank.", group=_READING),
    ] = None,
    allow_pickle: Annotated[
        bool, option("--allow-pickle", help="Read pickles from the Hub too; nothing in them is run.", group=_READING)
    ] = False,
    no_sidecars: Annotated[
        bool, option("--no-sidecars", help="Leave the texts and previews beside a file there.", group=RESULT)
    ] = False,
    list_dialects: Annotated[bool, option("--list-dialects", help="Show the layouts and stop.", group=RESULT)] = False,
    force: Force = False,
    json: AsJson = False,
) -> None:  # fmt: skip
    """Write adapters in another layout; every layer's change is kept, to the dtype's rounding.

    --for PROGRAM writes what that program reads exactly, or says why it cannot.

    A folder is converted file by file. A reference's weight (mine.safetensors:0.5) goes into the file. What lies
    beside a file (NAME.json, .civitai.info, .txt, previews) is copied along, and never written over.

    Example: texforce-hub convert old/adapter_model.bin --for a1111 -o new.safetensors
    """
    from texforce_hub.hub.convert_many import convert_all
    from texforce_hub.hub.filenames import check_name

    if list_dialects:
        _print_dialects(json=json)
        return
    if not refs or output is None:
        raise ConfigError(f"no {'--output' if refs else 'REF'}; expected e.g. convert lora.safetensors --output new/")
    dialect = _choose_dialect(dialect, reader)
    check_name(output)
    jobs, alone = _plan(refs, output, dialect)
    if alone:
        refuse_existing(output, force=force, inside=names.file_in(dialect))
    options: dict[str, Any] = {"reader": reader, "family": family, "dtype": dtype, "alpha": alpha}
    options["force"] = force or alone
    conversions = convert_all(jobs, dialect=dialect, **options, allow_pickle=allow_pickle, sidecars=not no_sidecars)
    done = list(track(conversions, total=len(jobs), what="converting"))
    if alone and done[0].error is not None:
        raise FileError(done[0].error)
    for text in _gathered(text for conversion in done for text in conversion.notes):
        note(text)
    if json:
        put_json({"files": [_as_dict(conversion) for conversion in done]})
    elif alone:
        put(str(read_back(done[0].output)))
    else:
        _print(done, dialect)
    failed = sum(conversion.error is not None for conversion in done)
    if failed:
        raise FileError(f"{failed} of {len(done)} files could not be converted; the table says why")


def _choose_dialect(dialect: str | None, reader: str | None) -> str:
    """The layout asked for, or the one that a program reads."""
    from texforce_hub.formats.readers import find_reader

    if dialect is not None and reader is not None:
        raise ConfigError("--for chooses the layout; give it or --dialect, not both")
    return find_reader(reader).layouts[0] if reader else names.read_dialect(dialect or "diffusers")


def _plan(refs: list[str], output: Path, dialect: str) -> "tuple[list[Job], bool]":
    """What to convert, and whether it is one adapter into one file or folder."""
    from texforce_hub.hub.convert import parse_weights
    from texforce_hub.hub.convert_many import Job, plan_conversions
    from texforce_hub.hub.filenames import is_safetensors
    from texforce_hub.hub.find import find_bundle

    if len(refs) == 1 and (is_safetensors(output.name) or _is_one(refs[0], dialect)):
        return [Job(find_bundle(refs[0]), output, parse_weights(refs[0]))], True
    return plan_conversions(refs, output, dialect), False


def _is_one(ref: str, dialect: str) -> bool:
    """Whether a reference means one file, or a folder that is one adapter and becomes PEFT's folder of that name."""
    from texforce_hub.hub.convert_many import is_usual
    from texforce_hub.hub.find import find_bundles, find_path

    path = find_path(ref)
    if not path.is_dir():
        return True
    bundles = find_bundles(ref) if dialect == "peft" else []
    return len(bundles) == 1 and is_usual(bundles[0], path)


def _print(done: "list[Conversion]", dialect: str) -> None:
    results = {c.output: read_back(c.output) for c in done if c.error is None}
    if LOUDNESS.quiet:
        for path in results:
            put(str(path))
    readers = {result.read_by for result in results.values()}
    rows = [_row(conversion, results.get(conversion.output)) for conversion in done]
    columns = ["from", "to", "layers", "rank", "MB", "read whole by"]
    if len(readers) == 1:  # one line says it of all
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    put_table(columns, rows, drop=("MB", "rank", "layers", "read whole by"))
    by = f"; read whole by {readers.pop()}" if len(readers) == 1 else ""
    put(f"{count_of(len(results), 'adapter')} written in {dialect} layout{by}")


def _row(conversion: "Conversion", result: Written | None) -> list[str]:
    if conversion.error is not None or result is None:
        return [str(conversion.source), conversion.error or "", "", "", "", ""]
    facts = [str(result.layers), span(result.ranks), f"{result.size / 1e6:.2f}", result.read_by]
    return [str(conversion.source), str(conversion.output), *facts]


def _print_dialects(*, json: bool) -> None:
    rows = names.dialect_rows()
    if json:
        put_json({name: {"use": use, "called": called} for name, use, called in rows})
    else:
        put_table(["layout", "here", "also called"], [list(row) for row in rows])


def _gathered(notes: Iterable[str]) -> Iterator[str]:
    """Each ``FILE: what there is to say`` once, with the first file of which it is said and how many more there are."""
    files: dict[str, list[str]] = {}
    for line in notes:
        file, _, text = line.partition(": ")
        files.setdefault(text, []).append(file)
    for text, named in files.items():
        more = f" (and of {len(named) - 1} more files)" if len(named) > 1 else ""
        yield f"{named[0]}: {text}{more}"


def _as_dict(conversion: "Conversion") -> dict[str, Any]:
    values = {"source": str(conversion.source), "output": str(conversion.output), "error": conversion.error}
    held = {} if conversion.error is not None else read_back(conversion.output).as_dict()
    return values | {"notes": list(conversion.notes)} | held
