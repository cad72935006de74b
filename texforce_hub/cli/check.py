"""``texforce-hub check``: will an adapter fit a base?"""

from typing import Annotated

import typer

from texforce_hub.cli.console import first_of, put, put_json, put_table, say


def register(app: typer.Typer) -> None:
    """Add ``check``."""
    app.command("check")(check)


def check(
    ref: Annotated[str, typer.Argument(metavar="REF", help="A file, a folder, a catalogue name, a Hub id.")],
    base: Annotated[
        str, typer.Option("--base", help="A family (sd1, sdxl …), shapes, a pipeline's folder, a checkpoint file.")
    ],
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say whether an adapter fits a base, layer by layer, before anything is loaded. Exit 0: it fits; 1: it does not.

    Example: texforce-hub check lora.safetensors --base sd1
    """
    from texforce_hub.apply.fit import check_adapter

    fit = check_adapter(ref, base)
    if json:
        put_json(fit.as_dict())
    else:
        put(fit.verdict)
        wrong = {**fit.unmatched, **fit.misshapen, **fit.unreadable}
        if wrong:
            put_table(["layer", "why not"], [[name, reason] for name, reason in wrong.items()])
        for note in first_of(fit.notes):
            say(f"note: {note}")
    raise typer.Exit(0 if fit.fits else 1)
