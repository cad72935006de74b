"""``texforce-hub doctor``: whether this machine can do the work, and what to do where it cannot."""

from typing import Annotated

import typer

from texforce_hub.cli.console import put_json, put_table


def register(app: typer.Typer) -> None:
    """Add ``doctor``."""
    app.command("doctor")(doctor)


def doctor(
    base: Annotated[
        list[str] | None, typer.Option("--base", help="Also look for this base: folder, file or Hub id; repeat.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="Default: CUDA if present.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Look at versions, device, dtypes, cache, endpoint, token and bases; say what to do. Exit 1 if there is a problem.

    Example: texforce-hub doctor --base stable-diffusion-v1-5/stable-diffusion-v1-5
    """
    from texforce_hub.doctor import examine

    found = list(examine(base or [], device=device))
    problems = sum(one.state == "problem" for one in found)
    if json:
        put_json({"problems": problems, "findings": [one.as_dict() for one in found]})
    else:
        put_table(["", "", "found", "what to do"], [[one.name, one.state, one.found, one.advice] for one in found])
    raise typer.Exit(1 if problems else 0)
