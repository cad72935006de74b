"""Several adapters that guide together without being added: each predicts on its own.

``average``: in every step the U-Net is called once for each adapter, with its own embeddings, and the predictions are
averaged; guidance is linear in them, so this is the average of the guided predictions. ``switch``: each step has one
adapter, by turns in the stack's order. (Zhong et al. 2024, arXiv 2402.16843, call them LoRA Composite and LoRA Switch.)
Adapters of the same layers do not disturb each other's weights so, at the cost of calls or of steps.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from texforce_hub.errors import ConfigError
from texforce_hub.hub.refs.adapter import AdapterRef

Composite = Literal["", "average", "switch"]
"""How adapters act together; empty: added, as always."""

Refs = tuple[AdapterRef, ...]
"""A stack's weights, in its order."""


def check_composite(composite: str) -> None:
    """Refuse a mode that there is not.

    Raises:
        ConfigError: names those that there are.
    """
    if composite not in get_args(Composite):
        raise ConfigError(f"composite {composite!r}; expected 'average' or 'switch', or nothing for one sum")


def passes(refs: Sequence[AdapterRef], composite: str, step: int) -> tuple[Refs, ...]:
    """The weights of each U-Net call of a step: one call, or with ``average`` one for each adapter."""
    if not composite:
        return (tuple(refs),)
    alone = tuple(_alone(refs, number) for number in range(len(refs)))
    return alone if composite == "average" else (alone[step % len(alone)],)


def _alone(refs: Sequence[AdapterRef], number: int) -> Refs:
    """The weights with one adapter's own, and 0 for the others."""
    return tuple(ref if i == number else replace(ref, weight=0.0, parts=()) for i, ref in enumerate(refs))


def mean_of(outputs: Sequence[Any]) -> Any:
    """The mean of several outputs of a U-Net: tuples whose first entry is the prediction, or outputs with a sample."""
    first = outputs[0]
    if isinstance(first, tuple):
        return (sum(output[0] for output in outputs) / len(outputs), *first[1:])
    return replace(first, sample=sum(output.sample for output in outputs) / len(outputs))
