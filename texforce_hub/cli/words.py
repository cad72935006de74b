"""``texforce-hub words``: which words a text adapter moves."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli.console import put_json
from texforce_hub.cli.options import LARGEST_SEED, SAMPLING, AsJson, Base, Device, Guidance, Steps, option
from texforce_hub.cli.table import put_table
from texforce_hub.errors import ConfigError

if TYPE_CHECKING:
    from texforce_hub.evaluate.attention import PromptAttention
    from texforce_hub.evaluate.words import PromptShift

_BAR = 30  # characters of the longest bar
_STEPS, _GUIDANCE = 15, 5.0


def register(app: typer.Typer) -> None:
    """Add ``words``."""
    app.command("words")(words)


def words(
    adapter: Annotated[str, typer.Argument(metavar="STACK", help="A reference or a stack, such as 'A:0.8 + B'.")],
    prompt: Annotated[list[str], option("--prompt", metavar="TEXT", help="Repeatable.", group=SAMPLING)],
    attention: Annotated[
        bool, option("--attention", help="Draw without and with it; show each word's attention too.", group=SAMPLING)
    ] = False,
    seed: Annotated[
        int | None, option("--seed", metavar="N", min=0, max=LARGEST_SEED, help="Of these pictures.", group=SAMPLING)
    ] = None,
    inference_steps: Steps = None,
    guidance: Guidance = None,
    base: Base = "shapes",
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Show how far an adapter moves the embedding of every word of a prompt.

    A word's embedding carries the words before it: what follows a moved word moves too.
    """
    from texforce_hub.evaluate.attention import measure_attention
    from texforce_hub.evaluate.words import measure_words
    from texforce_hub.hub.refs.stack import Stack
    from texforce_hub.pipelines.load import load_pipeline

    if not attention and (seed, inference_steps, guidance) != (None, None, None):
        raise ConfigError("--seed, --inference-steps and --guidance say how --attention draws; give that too")
    stack = list(Stack.parse(adapter).refs)
    pipe = load_pipeline(base, device=device)
    shifts = measure_words(pipe, stack, prompt)
    seen: list[PromptAttention] = []
    if attention:
        how: dict[str, Any] = {"seed": seed or 0, "inference_steps": inference_steps or _STEPS}
        seen = measure_attention(pipe, stack, prompt, guidance=_GUIDANCE if guidance is None else guidance, **how)
    if json:
        put_json(_describe(shifts, seen))
    else:
        _print(shifts, seen)


def _describe(shifts: Sequence["PromptShift"], seen: Sequence["PromptAttention"]) -> list[dict[str, Any]]:
    """The shifts, and with each word its share of the attention, before and after."""
    described = [shift.as_dict() for shift in shifts]
    for of_prompt, watched in zip(described, seen):
        for word, found in zip(of_prompt["words"], watched.words, strict=True):
            word["attention"] = dict(zip(("before", "after"), found.shares, strict=True))
    return described


def _print(shifts: Sequence["PromptShift"], seen: Sequence["PromptAttention"]) -> None:
    most = max((word.shift for shift in shifts for word in shift.words), default=0.0) or 1.0
    for number, shift in enumerate(shifts):
        rows = [
            [word.word, f"{word.shift:.3f}", f"{word.cosine:+.3f}", "", "█" * round(_BAR * word.shift / most)]
            for word in shift.words
        ]
        if seen:
            for row, word in zip(rows, seen[number].words, strict=True):
                row[3] = "{:.1%} → {:.1%}".format(*word.shares)
        put_table(["word", "shift", "cosine", "attention", ""], rows, title=shift.prompt)
