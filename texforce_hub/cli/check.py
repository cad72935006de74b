"""``texforce-hub check``: will an adapter fit a base?"""

from typing import Annotated

import typer

from texforce_hub.cli import names
from texforce_hub.cli.console import LOUDNESS, first_of, note, put, put_detail, put_json
from texforce_hub.cli.options import WORK, AsJson, Ref, Strict, option
from texforce_hub.cli.summary import by_part, by_reason
from texforce_hub.cli.table import put_table


def register(app: typer.Typer) -> None:
    """Add ``check``."""
    app.command("check")(check)


def check(
    ref: Ref,
    base: Annotated[
        str,
        option(
            "--base", metavar="BASE", help="A family (sd1, sdxl …), shapes, a pipeline's folder, a checkpoint file.",
            group=WORK, autocompletion=lambda incomplete: names.families(incomplete) + names.bases(incomplete),
        ),
    ],
    strict: Strict = True,
    json: AsJson = False,
) -> None:  # fmt: skip
    """Say whether an adapter fits a base, layer by layer, before anything is loaded. Exit 0: it fits; 1: it does not.

    Example: texforce-hub check lora.safetensors --base sd1
    """
    from texforce_hub.apply.fit import check_adapter

    fit = check_adapter(ref, base, strict=strict)
    if json:
        put_json(fit.as_dict())
    else:
        wrong = {**fit.unmatched, **fit.misshapen, **fit.unreadable}
        for text in fit.notes if LOUDNESS.verbose else first_of(fit.notes, 5):
            note(text)
        if wrong and LOUDNESS.verbose:
            put_table(["layer", "why not"], [[name, reason] for name, reason in wrong.items()])
        for line in by_reason(wrong, most=5):
            put_detail(line)
        if fit.matched and not fit.fits:
            put_detail(f"found in the base: {by_part(fit.matched)}")
        put(fit.verdict)
    raise typer.Exit(0 if fit.fits else 1)
