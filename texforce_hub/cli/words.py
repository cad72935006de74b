"""``texforce-hub words``: which words a text adapter moves."""

from typing import Annotated

import typer

from texforce_hub.cli.console import put_json
from texforce_hub.cli.options import SAMPLING, AsJson, Base, Device, option
from texforce_hub.cli.table import put_table

_BAR = 30  # characters of the longest bar


def register(app: typer.Typer) -> None:
    """Add ``words``."""
    app.command("words")(words)


def words(
    adapter: Annotated[str, typer.Argument(metavar="STACK", help="A reference or a stack, such as 'A:0.8 + B'.")],
    prompt: Annotated[list[str], option("--prompt", metavar="TEXT", help="Repeatable.", group=SAMPLING)],
    base: Base = "shapes",
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Show how far an adapter moves the embedding of every word of a prompt.

    A word's embedding carries the words before it: what follows a moved word moves too.
    """
    from texforce_hub.evaluate.words import measure_words
    from texforce_hub.hub.refs.stack import Stack
    from texforce_hub.pipelines.load import load_pipeline

    stack = list(Stack.parse(adapter).refs)
    shifts = measure_words(load_pipeline(base, device=device), stack, prompt)
    if json:
        put_json([shift.as_dict() for shift in shifts])
        return
    most = max((word.shift for shift in shifts for word in shift.words), default=0.0) or 1.0
    for shift in shifts:
        rows = [
            [word.word, f"{word.shift:.3f}", f"{word.cosine:+.3f}", "█" * round(_BAR * word.shift / most)]
            for word in shift.words
        ]
        put_table(["word", "shift", "cosine", ""], rows, title=shift.prompt)
