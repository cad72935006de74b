"""``texforce-hub verify``: is a merged adapter what its recipe gives?"""

from typing import Annotated

import typer

from texforce_hub.cli.console import put, put_json


def register(app: typer.Typer) -> None:
    """Add ``verify``."""
    app.command("verify")(verify)


def verify(
    result: Annotated[str, typer.Argument(help="A merged adapter that carries its recipe.")],
    base: Annotated[str | None, typer.Option("--base", help="Needed only by DoRA layers.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Default: CUDA if present.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a result's recipe again and compare; exit 1 if it differs."""
    from texforce_hub.device import choose_device
    from texforce_hub.merge.replay import verify_merge
    from texforce_hub.pipelines.load import load_pipeline

    target = choose_device(device)
    answer = verify_merge(result, base=None if base is None else load_pipeline(base, device=target), device=target)
    if json:
        put_json(answer.as_dict())
    else:
        verdict = "same" if answer.same else "DIFFERS"
        put(f"{verdict}: largest difference {answer.difference:.2g} in {answer.worst or 'no layer'}, ")
        put(f"allowed {answer.tolerance:.2g}; {len(answer.missing)} layers missing, {len(answer.extra)} too many")
    raise typer.Exit(0 if answer.same else 1)
