"""``texforce-hub report``: one page of what was evaluated, drawn and trained."""

from pathlib import Path
from typing import Annotated

import typer

from texforce_hub.cli import names
from texforce_hub.cli.console import note, put, put_json
from texforce_hub.cli.options import RESULT, WORK, AsJson, Device, Dtype, Force, option, refuse_existing, refuse_suffix
from texforce_hub.notebook import write_size


def register(app: typer.Typer) -> None:
    """Add ``report``."""
    app.command("report")(report)


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR…", help="Folders that evaluate, apply and train wrote.")
    ],
    output: Annotated[
        Path | None, option("--output", "-o", metavar="FILE", help="Default: report.html in the first.", group=RESULT)
    ] = None,
    words: Annotated[
        int, option("--words", metavar="N", min=0, max=100, help="Prompts whose words are measured: 4.", group=WORK)
    ] = 4,
    prompt: Annotated[
        list[str] | None, option("--prompt", metavar="TEXT", help="Measure this one's instead; repeatable.", group=WORK)
    ] = None,
    base: Annotated[
        str | None,
        option("--base", metavar="BASE", help="For that; default: what the folders name, if it is here.", group=WORK,
               autocompletion=names.bases),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Make one self-contained page: figures, pictures with sliders, training, where adapters act, words they move."""
    from texforce_hub import __version__
    from texforce_hub.evaluate.report.page import is_report, make_report, write_report

    path = output or folders[0] / "report.html"
    refuse_suffix(path, (".html", ".htm"))
    if not (path.is_file() and is_report(path)):  # an older page of the same folder is made anew
        refuse_existing(path, force=force)
    page = make_report(
        folders, words=words, prompts=prompt or (), base=base, device=device, dtype=dtype, version=__version__
    )
    write_report(page, path)
    if as_json:
        put_json({"page": str(path), "bytes": path.stat().st_size, "left_out": page.left_out})
        return
    for line in page.left_out:
        note(line)
    put(f"{path}: {write_size(path.stat().st_size)}")
