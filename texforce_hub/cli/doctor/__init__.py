"""Whether this machine can do the work, and what to do where it cannot: nothing is downloaded, no secret is shown.

It is for broken machines: nothing is imported here that may be broken before it was tried elsewhere.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Annotated

import typer

from texforce_hub.cli.console import put_json
from texforce_hub.cli.doctor.bases import examine_base
from texforce_hub.cli.doctor.endpoint import examine_address
from texforce_hub.cli.doctor.finding import Finding, watch
from texforce_hub.cli.doctor.imports import Attempt
from texforce_hub.cli.doctor.libraries import (
    Attempts,
    examine_torchvision,
    examine_versions,
    examine_vocabulary,
    import_all,
)
from texforce_hub.cli.progress import bars
from texforce_hub.cli.table import put_table
from texforce_hub.hub.catalog import read_catalog


def examine(bases: Sequence[str] = (), *, device: str | None = None, online: bool = False) -> Iterator[Finding]:
    """Everything looked at, in turn: versions, extras, rewards, device, dtypes, cache, endpoint, token, bases.

    ``bases`` are looked for beside ``shapes`` and the catalogue's; ``device`` is CUDA if present, else the CPU.
    ``online`` asks the Hub, too.
    What cannot be looked at is a finding, too.
    """
    attempts: dict[str, Attempt] = {}
    yield from watch("imports", lambda: _try_imports(attempts))
    yield from watch("versions", lambda: examine_versions(attempts))
    yield from watch("torchvision", lambda: [examine_torchvision(attempts)])
    yield from watch("vocabulary", lambda: [examine_vocabulary()])
    yield from watch("rewards", _examine_rewards)
    yield from _unless(_find_obstacle("torch", attempts), "device", lambda: _examine_device(device))
    broken = list(examine_address())
    yield from broken
    obstacle = broken[0].found if broken else _find_obstacle("huggingface_hub", attempts)
    yield from _unless(obstacle, "cache and token", _examine_hub)
    if online:
        yield from _unless(obstacle, "online", _ask_hub)
    yield from watch("catalogue", lambda: _examine_bases(_list_catalogue(), obstacle))
    yield from _examine_bases(["shapes", *bases], obstacle)


def _try_imports(attempts: dict[str, Attempt]) -> Iterable[Finding]:
    attempts |= import_all()
    return ()


def _find_obstacle(module: str, attempts: Attempts) -> str:
    """Why nothing that needs a library can be looked at; empty if it can."""
    absent = importlib.util.find_spec(module) is None or attempts.get(module, Attempt()).reason
    return f"{module} cannot be imported" if absent else ""


def _unless(obstacle: str, name: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What an examination finds; behind an obstacle, whose own finding is a problem already, it is not made."""
    if obstacle:
        yield Finding(name, "note", f"not looked at: {obstacle}", "mend that first")
        return
    yield from watch(name, look)


def _examine_device(name: str | None) -> Iterator[Finding]:
    from texforce_hub.cli.doctor.device import examine_device

    return examine_device(name)


def _examine_rewards() -> Iterator[Finding]:
    from texforce_hub.cli.doctor.rewards import examine_rewards

    return examine_rewards()


def _examine_hub() -> Iterator[Finding]:
    from texforce_hub.cli.doctor.cache import examine_cache, examine_endpoint, examine_token

    yield from watch("cache", examine_cache)
    yield from watch("endpoint", lambda: [examine_endpoint()])
    yield from watch("token", lambda: [examine_token()])


def _ask_hub() -> list[Finding]:
    from texforce_hub.cli.doctor.online import examine_online

    return [examine_online()]


def _examine_bases(bases: Sequence[str], obstacle: str) -> Iterator[Finding]:
    for base in dict.fromkeys(bases):
        yield from watch(f"base {base}", partial(_examine_known, base, obstacle))


def _examine_known(base: str, obstacle: str) -> list[Finding]:
    return [examine_base(base, obstacle=obstacle)]


def _list_catalogue() -> list[str]:
    return [entry.repo or str(entry.folder) for entry in read_catalog().values() if entry.kind == "base"]


def register(app: typer.Typer) -> None:
    """Add ``doctor``."""
    app.command("doctor")(doctor)


def doctor(
    base: Annotated[
        list[str] | None, typer.Option("--base", help="Also look for this base: folder, file or Hub id; repeat.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="Default: CUDA if present.")] = None,
    online: Annotated[bool, typer.Option("--online", help="Ask the Hub whether it answers, and as whom.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Look at versions, device, dtypes, cache, endpoint, token and bases; say what to do. Exit 1 if there is a problem.

    Example: texforce-hub doctor --base stable-diffusion-v1-5/stable-diffusion-v1-5
    """

    findings = []
    with bars({"looking": 22 + online + len(base or [])}) as advance:
        for finding in examine(base or [], device=device, online=online):
            findings.append(finding)
            advance("looking", 1)
    problems = sum(finding.state == "problem" for finding in findings)
    if json:
        put_json({"problems": problems, "findings": [finding.as_dict() for finding in findings]})
    else:
        put_table(
            ["", "", "found", "what to do"],
            [[finding.name, finding.state, finding.found, finding.advice] for finding in findings],
        )
    raise typer.Exit(1 if problems else 0)
