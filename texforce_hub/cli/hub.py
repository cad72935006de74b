"""``texforce-hub push``, ``pull``, ``search`` and ``list``: adapters to the Hub, from it, in it, and here."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli.console import put, put_json, say
from texforce_hub.cli.table import put_table

if TYPE_CHECKING:
    from texforce_hub.hub.push import PushedAdapter

_DIALECT = "A layout to write: diffusers, kohya, peft …; repeat for more. Default: these three."
_LICENSE = "An id of the Hub's list; default: the card's there, the catalogue's, or the base's."
_IMAGES = "Pictures for the gallery: a file, or a folder of apply --output."
_EVALUATION = "What evaluate --json printed; default: evaluation.json beside the adapter."


def register(app: typer.Typer) -> None:
    """Add ``push``."""
    app.command("push")(push)


def push(
    ref: Annotated[str, typer.Argument(metavar="REF", help="A file, a run's folder, a merge result, any reference.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is seen by its owner alone.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", metavar="BRANCH", help="Default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
    base_id: Annotated[str | None, typer.Option("--base-id", help="Hub id of the base, if the file has none.")] = None,
    license: Annotated[str | None, typer.Option("--license", help=_LICENSE)] = None,
    dialect: Annotated[list[str] | None, typer.Option("--dialect", help=_DIALECT)] = None,
    images: Annotated[Path | None, typer.Option("--images", help=_IMAGES)] = None,
    evaluation: Annotated[Path | None, typer.Option("--evaluation", help=_EVALUATION)] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="Of layers that store none; default: their rank.")
    ] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read a pickle from the Hub.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show who, where, files and card; send nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Publish an adapter: weights for diffusers, PEFT, ComfyUI and A1111, and a card, in one commit.

    Log in with 'hf auth login', or set HF_TOKEN. What you write into the card there stays.

    Example: texforce-hub push runs/colour alice/colour --base-id stable-diffusion-v1-5/stable-diffusion-v1-5
    """
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
