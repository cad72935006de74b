"""``texforce-hub verify``: is a merged adapter what its recipe gives?"""

import typer

from texforce_hub.cli.console import put, put_json
from texforce_hub.cli.options import AsJson, Device, DoraBase, Ref, load_base


def register(app: typer.Typer) -> None:
    """Add ``verify``."""
    app.command("verify")(verify)


def verify(result: Ref, base: DoraBase = None, device: Device = None, json: AsJson = False) -> None:
    """Run a merged adapter's recipe again and compare; exit 1 if it differs."""
    from texforce_hub.device import choose_device
    from texforce_hub.merge.replay import verify_merge

    target = choose_device(device)
    answer = verify_merge(result, base=load_base(base, device=target), device=target)
    if json:
        put_json(answer.as_dict())
    else:
        verdict = "same" if answer.same else "DIFFERS"
        put(
            f"{verdict}: largest difference {answer.difference:.2g} in {answer.worst or 'no layer'}, "
            f"allowed {answer.tolerance:.2g}; {len(answer.missing)} layers missing, {len(answer.extra)} too many"
        )
    raise typer.Exit(0 if answer.same else 1)
