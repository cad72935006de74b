"""A stack on a pipeline as people read it: one line, or a notebook's table."""

from collections.abc import Iterator, Mapping, Sequence

from texforce_hub.adapter.value import LayerName
from texforce_hub.apply.matching import Decision, matches
from texforce_hub.families.names import part_of
from texforce_hub.hub.stack import StackEntry
from texforce_hub.notebook import Bar, Cell, table

Decisions = Mapping[str, Mapping[LayerName, Decision]]


def describe_stack(entries: Sequence[StackEntry], decisions: Decisions, state: str) -> str:
    """``style:0.8 + light (24 of 24 layers in text_encoder), attached``."""
    names = list(_show_names(entries))
    shown = " + ".join(names[:3]) + (f" + {len(names) - 3} more" if len(names) > 3 else "")
    fitting = [layer for of_layers in decisions.values() for layer, decision in of_layers.items() if matches(decision)]
    total = sum(map(len, decisions.values()))
    parts = ", ".join(dict.fromkeys(map(part_of, fitting)))
    return f"Applied({shown} ({len(fitting)} of {total} layers in {parts or 'no part'}), {state})"


def tabulate_stack(entries: Sequence[StackEntry], decisions: Decisions, state: str) -> str:
    """A row for each adapter and part: its weight, and the layers that act, with a bar of their share, as HTML."""
    rows: list[Sequence[Cell]] = []
    for entry, name in zip(entries, _show_names(entries)):
        of_layers = decisions[entry.label]
        for part in entry.adapter.parts:
            acting = [bool(matches(decision)) for layer, decision in of_layers.items() if part_of(layer) == part]
            share = sum(acting) / len(acting) if acting else 0.0
            rows.append((name, part, Bar(f"{sum(acting)} of {len(acting)}", share)))
    return table(f"Stack of {len(entries)}, {state}", ("adapter", "part", "layers that act"), rows)


def _show_names(entries: Sequence[StackEntry]) -> Iterator[str]:
    """``label:weight``; of weights by parts and blocks, the first."""
    for entry in entries:
        ref = entry.weight
        parts = [f"{part}={weight:g}" for part, weight in ref.parts]
        more = ",…" if len(parts) > 1 else ""
        weights = f"{parts[0]}{more}" if parts else "" if ref.weight == 1 else f"{ref.weight:g}"
        yield f"{entry.label}:{weights}" if weights else entry.label
