"""The results of an evaluation as tables: of plain cells for a terminal, as Markdown for a model card."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from texforce_hub.evaluate.evaluation import DIVERSITY
from texforce_hub.hub.markdown import escape, escape_cell

_WORDS = {"held-out": "held-out prompts", "training": "training prompts", "paraphrase": "paraphrases"}


@dataclass(frozen=True, slots=True)
class Figures:
    """One table: a measure on a group of prompts."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tabulate(results: Mapping[str, Any]) -> Iterator[Figures]:
    """A table for every group of prompts and measure; with every pair compared, one more for the pairs.

    Columns: the stack, its mean with its interval, the paired difference from the base, the share of prompts on which
    it is better, p corrected for all of the table's comparisons, and the difference that this many prompts could show.
    """
    first = results["variants"][0]["name"]
    held_out = {reward["name"] for reward in results["rewards"] if reward["held_out"]}
    for group, of_group in results["groups"].items():
        for measure, figures in of_group["measures"].items():
            mark = " (held out)" if measure in held_out else ""
            words = _WORDS[group].removesuffix("s") if of_group["prompts"] == 1 else _WORDS[group]
            title = f"{measure}{mark}, {of_group['prompts']} {words}"
            columns = ["stack", "mean", f"minus {first}, paired", "prompts better", "p (Holm)", "could show"]
            against = {c["stack"]: c for c in figures["comparisons"] if c["other"] == first}
            rows = [(name, _mean(mean), *_compared(against.get(name))) for name, mean in figures["means"].items()]
            yield Figures(title, tuple(columns), tuple(rows))
            pairs = [c for c in figures["comparisons"] if c["other"] != first]
            if pairs:
                columns = ["pair", "difference, paired", "prompts better", "p (Holm)", "could show"]
                rows = [(f"{c['stack']} − {c['other']}", *_compared(c)) for c in pairs]
                yield Figures(f"{title}, pairs", tuple(columns), tuple(rows))


def describe_sampling(results: Mapping[str, Any]) -> str:
    """How the pictures were drawn and the figures made, in one sentence."""
    sampling = results["sampling"]
    seeds, steps = len(sampling["seeds"]), sampling["inference_steps"]
    return (
        f"{seeds} {'seeds' if seeds > 1 else 'seed'} of every prompt, {steps} {'steps' if steps > 1 else 'step'}, "
        f"guidance {sampling['guidance']:g}; 95 % bootstrap intervals over prompts, win rates after Wilson, "
        "p by flipping signs" + (f"; {DIVERSITY}: mean pixel distance between a prompt's seeds" if seeds > 1 else "")
    )


def write_markdown(results: Mapping[str, Any]) -> str:
    """All tables as Markdown, for a model card."""
    parts = [f"# Evaluation on {escape(results['base'])}", escape(describe_sampling(results)) + "."]
    for figures in tabulate(results):
        lines = [figures.columns, ("---",) * len(figures.columns)]
        cells = [tuple(map(escape_cell, row)) for row in figures.rows]
        table = "\n".join(f"| {' | '.join(row)} |" for row in (*lines, *cells))
        parts.append(f"## {escape(figures.title)}\n\n{table}")
    if results["requirements"]:
        parts.append("## Required\n\n" + "\n".join(f"- {escape(text)}" for text in describe_requirements(results)))
    return "\n\n".join(parts) + "\n"


def describe_requirements(results: Mapping[str, Any]) -> list[str]:
    """Each requirement in a line: what it asks for, the difference, and whether it is met."""
    return [
        f"{r['stack']} > {r['other']} by {r['reward']}: {_interval(r['difference'])}, "
        f"{'met' if r['met'] else 'not met: the interval is not above 0'}"
        for r in results["requirements"]
    ]


def _mean(mean: Mapping[str, float]) -> str:
    return f"{mean['mean']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]"


def _interval(numbers: Mapping[str, float]) -> str:
    return f"{numbers['mean']:+.3f} [{numbers['low']:+.3f}, {numbers['high']:+.3f}]"


def _compared(comparison: Mapping[str, Any] | None) -> Sequence[str]:
    if comparison is None:
        return "", "", "", ""
    wins, shown = comparison["wins"], comparison["resolvable"]
    return (
        _interval(comparison["difference"]),
        f"{wins['mean']:.0%} [{wins['low']:.0%}, {wins['high']:.0%}]",
        f"{comparison['p_holm']:.4f}",
        "–" if shown is None else f"{shown:.3f}",
    )
