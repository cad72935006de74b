"""``texforce-hub push``, ``pull``, ``search`` and ``list``: adapters to the Hub, from it, in it, and here."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli import names
from texforce_hub.cli.console import put, put_detail, put_json, say
from texforce_hub.cli.options import RESULT, AsJson, Ref, Refs, option
from texforce_hub.cli.table import put_table

if TYPE_CHECKING:
    from texforce_hub.hub.pull import FetchedAdapter
    from texforce_hub.hub.push import PushedAdapter
    from texforce_hub.hub.search import FoundAdapter

_CARD, _WHICH = "Card", "Which"
_LICENSE = "An id of the Hub's list; default: the card's there, the catalogue's, or the base's."

DryRun = Annotated[bool, option("--dry-run", help="Show what would be done; change nothing.", group=RESULT)]


def register(app: typer.Typer) -> None:
    """Add ``push``, ``pull``, ``search`` and ``list``."""
    for name, command in (("push", push), ("pull", pull), ("search", search), ("list", list_here)):
        app.command(name)(command)


def push(
    ref: Ref,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made if it is not there.")],
    private: Annotated[
        bool, option("--private", help="A new repository is seen by its owner alone.", group=RESULT)
    ] = False,
    revision: Annotated[
        str | None, option("--revision", metavar="BRANCH", help="Default: main.", group=RESULT)
    ] = None,
    create_pr: Annotated[bool, option("--create-pr", help="Propose it as a pull request.", group=RESULT)] = False,
    message: Annotated[
        str | None, option("--message", "-m", metavar="TEXT", help="Of the commit.", group=RESULT)
    ] = None,
    dialect: Annotated[
        list[str] | None,
        option("--dialect", metavar="NAME", help="A layout to write, repeatable; default: diffusers, kohya, peft.",
               group=RESULT, autocompletion=names.writable_dialects),
    ] = None,
    base_id: Annotated[
        str | None, option("--base-id", metavar="ID", help="Hub id of the base, if the file has none.", group=_CARD)
    ] = None,
    license: Annotated[str | None, option("--license", metavar="ID", help=_LICENSE, group=_CARD)] = None,
    images: Annotated[
        Path | None, option("--images", metavar="PATH", help="Pictures: a file, or apply's folder.", group=_CARD)
    ] = None,
    evaluation: Annotated[
        Path | None,
        option("--evaluation", metavar="PATH", help="Figures: the folder that evaluate wrote.", group=_CARD),
    ] = None,
    alpha: Annotated[
        float | None, option("--alpha", metavar="X", help="Of layers that store none.", group=RESULT)
    ] = None,
    allow_pickle: Annotated[bool, option("--allow-pickle", help="Read a pickle from the Hub.", group=RESULT)] = False,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:  # fmt: skip
    """Publish an adapter: weights for diffusers, PEFT, ComfyUI and A1111, and a card, in one commit.

    Log in with 'hf auth login', or set HF_TOKEN. What you write into the card there stays.

    Example: texforce-hub push runs/colour alice/colour --base-id stable-diffusion-v1-5/stable-diffusion-v1-5
    """
    from texforce_hub.apply.fit import check_adapter
    from texforce_hub.hub.push import push_adapter

    done = push_adapter(
        ref,
        repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        message=message,
        base=base_id,
        license=license,
        dialects=dialect,
        images=images,
        evaluation=evaluation,
        alpha=alpha,
        allow_pickle=allow_pickle,
        check=check_adapter,
        dry_run=dry_run,
    )
    if json:
        put_json(_as_dict(done))
    elif dry_run:
        _put_plan(done)
    else:
        _put_done(done)


def _as_dict(done: "PushedAdapter") -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(done) | {"changed": done.changed}


def _put_plan(done: "PushedAdapter") -> None:
    state = "new" if done.is_new else "exists"
    private = ", private" if done.private else ""
    put(f"as {done.account} (role {done.role or 'unknown'}) → {done.url} ({state}{private}): ")
    put(f"{done.changed} files change, {len(done.files) - done.changed} stay as they are")
    put_table(["file", "bytes", ""], [[f.path, f"{f.size:,}", "changes" if f.changed else "stays"] for f in done.files])
    put(done.card)


def _put_done(done: "PushedAdapter") -> None:
    put(done.url)
    if not done.changed:
        say(f"nothing changed: all of it is there already, at commit {done.commit[:12]}")
        return
    say(f"{done.changed} files at commit {done.commit[:12]}")
    say("load it: pipeline.load_lora_weights(…) in diffusers; its page says how in other tools")


def pull(
    refs: Refs,
    output: Annotated[
        Path | None,
        option("--output", "-o", metavar="DIR", help="A folder to copy into; default: the cache.", group=RESULT),
    ] = None,
    lock: Annotated[
        Path | None,
        option("--lock", metavar="FILE", help="Note commits and hashes here, e.g. adapters.lock.", group=RESULT),
    ] = None,
    every: Annotated[bool, option("--all", help="All tensor files of a repository.", group=RESULT)] = False,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Fetch adapters from the Hub, checked, into the cache that all Hugging Face libraries share.

    Example: texforce-hub pull alice/colour@v1 --lock adapters.lock
    """
    from texforce_hub.hub.pull import fetch_adapter

    done = [fetch_adapter(ref, output=output, lock=lock, every=every, dry_run=dry_run) for ref in refs]
    if json:
        put_json({"adapters": [_describe_fetched(adapter) for adapter in done]})
        return
    for adapter in done:
        for file in adapter.files:
            state = "is here" if file.was_here else "would be fetched" if dry_run else "fetched"
            digest = f", SHA-256 {file.sha256}" if file.sha256 else ""
            put_detail(f"{adapter.repo}/{file.name} → commit {adapter.commit}{digest}, {file.size:,} bytes, {state}")
        put(str(adapter.path) if adapter.path is not None else f"{adapter.missing:,} bytes to fetch")


def _describe_fetched(adapter: "FetchedAdapter") -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(adapter) | {"missing": adapter.missing}


def search(
    words: Annotated[list[str] | None, typer.Argument(metavar="WORDS", help="What the names hold.")] = None,
    base: Annotated[
        str | None,
        option("--base", metavar="ID|FAMILY", help="A Hub id, or sd1, sd2, sdxl, sd3, flux, pixart.", group=_WHICH),
    ] = None,
    author: Annotated[
        str | None, option("--author", metavar="NAME", help="A user or an organisation.", group=_WHICH)
    ] = None,
    part: Annotated[
        str | None,
        option("--part", metavar="PART", help="Only those that change it, e.g. text_encoder.", group=_WHICH),
    ] = None,
    sort: Annotated[
        str, option("--sort", metavar="KEY", help="downloads (default), likes or updated.", group=_WHICH)
    ] = "downloads",
    limit: Annotated[
        int, option("--limit", metavar="N", min=1, max=1000, help="How many; 20 by default.", group=_WHICH)
    ] = 20,
    inspect: Annotated[
        bool, option("--inspect", help="Look into the files' headers; nothing is downloaded.", group=RESULT)
    ] = False,
    json: AsJson = False,
) -> None:
    """Find adapters on the Hub.

    Example: texforce-hub search colour --base sd1 --part text_encoder
    """
    from texforce_hub.hub.search import search_adapters

    adapters = search_adapters(
        " ".join(words or []), base=base, author=author, part=part, sort=sort, limit=limit, inspect=inspect
    )
    if json:
        put_json({"adapters": [adapter.as_dict() for adapter in adapters]})
        return
    looked = inspect or part is not None
    columns = ["adapter", "base", "licence", "downloads", "likes", "updated"]
    rows = [_describe_found(adapter) for adapter in adapters]
    if looked:
        columns += ["parts", "rank", "MB"]
        rows = [[*row, *_describe_header(adapter)] for row, adapter in zip(rows, adapters)]
    put_table(columns, rows, drop=("updated", "likes", "licence"))
    say(f"{len(adapters)} found" if adapters else "nothing found; try fewer words, or another --base")


def _describe_found(adapter: "FoundAdapter") -> list[str]:
    listed = adapter.listed
    name = f"{listed.repo} (gated)" if listed.gated else listed.repo
    return [name, listed.base, listed.license, f"{listed.downloads:,}", f"{listed.likes:,}", listed.updated]


def _describe_header(adapter: "FoundAdapter") -> list[str]:
    facts = adapter.inspection
    if facts is None or facts.error is not None:
        return ["unreadable", "", ""]
    parts = ", ".join(f"{part} {count}" for part, count in facts.parts.items())
    return [parts, ", ".join("–" if rank is None else str(rank) for rank in facts.ranks), f"{facts.size / 1e6:.2f}"]


def list_here(
    adapter_dir: Annotated[
        list[Path] | None,
        option("--adapter-dir", metavar="DIR", help="A folder to list, too; repeatable.", group=_WHICH),
    ] = None,
    json: AsJson = False,
) -> None:
    """Show the adapters that are here: the catalogue, the shared cache, and your folders.

    Example: texforce-hub list --adapter-dir loras
    """
    from texforce_hub.hub.available import list_shelf

    shelf = list_shelf(adapter_dir or [])
    if json:
        put_json({"adapters": [entry.as_dict() for entry in shelf]})
        return
    columns = ["name", "family", "parts", "rank", "MB", "licence", "where"]
    rows = [
        [
            entry.name,
            entry.family,
            ", ".join(entry.parts),
            ", ".join(map(str, entry.ranks)),
            f"{entry.size / 1e6:.2f}" if entry.size else "",
            entry.license,
            entry.source,
        ]
        for entry in shelf
    ]
    put_table(columns, rows, drop=("licence", "where"))
