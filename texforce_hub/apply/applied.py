"""Put a weighted stack of adapters on a pipeline, and take it off bit for bit.

The result is ``W + Σ wᵢ·ΔWᵢ``. All layers are matched and all shapes checked before anything is touched.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import nn

from texforce_hub.adapter.value import LayerName
from texforce_hub.apply.adapter_list import free_name
from texforce_hub.apply.collector import uncollected
from texforce_hub.apply.composite import Composite, check_composite, passes
from texforce_hub.apply.handle import Applied
from texforce_hub.apply.locks import alone_on
from texforce_hub.apply.matching import (
    Contributions,
    Decision,
    LiveShapes,
    Unmatched,
    Unused,
    WrongShape,
    check_ready,
    match,
    matches,
    sort_contributions,
)
from texforce_hub.apply.model import parts_of, plain
from texforce_hub.apply.schedule import check_schedulable
from texforce_hub.arguments import Pipeline
from texforce_hub.errors import ConfigError, MatchError
from texforce_hub.hub.stack import Item, StackEntry, Weight, read_stack

logger = logging.getLogger("texforce_hub")


def apply_adapter(
    pipe: Pipeline | nn.Module,
    adapters: Item | Sequence[Item],
    *,
    weight: Weight = 1.0,
    mode: Literal["attach", "fuse"] = "attach",
    strict: bool = True,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
    schedule: str = "",
    composite: Composite = "",
) -> Applied:
    """Put a stack on a pipeline, or on a bare text encoder or U-Net.

    Args:
        adapters: one or a list of references, paths or adapters, or ``(that, weight)`` pairs. A weight is a
            number or a mapping from parts, blocks or patterns to numbers (``{"text_encoder": 0.8}``).
        weight: the weight of the items that do not bring their own.
        mode: ``attach`` rides beside the weights, one low-rank pair per layer for the whole stack; ``fuse``
            writes into them, computed in float32 and rounded once.
        strict: refuse an adapter of which a layer has no place; otherwise that layer's decision says so.
        rounding: of weights narrower than float32 when fusing. ``nearest``: the smallest error, but a change
            below half a step of its weight is gone; ``stochastic``: up or down by chance, right on average.
        seed: of the stochastic rounding; with a parameter's name it decides every draw.
        schedule: how the weights of items without a schedule of their own change over the denoising steps of the
            pipeline's calls: ``"[0-0.4]"``, the first 40 % of them, or ``"0@0,1@0.3,0.2@1"``, weights at shares of
            them and straight lines between; as in ``"A:0.8[0-0.4]"`` and ``"A:0@0,1@0.3"``.
        composite: how several adapters act in the pipeline's calls: added (``""``); ``"average"``: the U-Net predicts
            under each alone, and the mean is taken; ``"switch"``: each step is under one, by turns.

    Raises:
        MatchError: an adapter does not fit, or is too large for the weights' dtype; nothing was changed.
        AdapterError: NaN or infinity in an adapter, or numbers too large for the layers' dtype.
        ConfigError: an impossible weight, mode, schedule or composite.
        FamilyError: a schedule or composite on something else than an SD1, SD2 or SDXL pipeline.

    Example:
        >>> from texforce_hub import apply_adapter, load_pipeline
        >>> pipeline = load_pipeline("shapes", device="cpu")
        >>> with apply_adapter(pipeline, [("shapes-colour", 0.8), ("shapes-shape", 0.4)]) as applied:
        ...     sorted(applied.weights)
        ['shapes-colour', 'shapes-shape']
    """
    if mode not in ("attach", "fuse"):
        raise ConfigError(f"mode {mode!r}; expected 'attach' or 'fuse'")
    if rounding not in ("nearest", "stochastic") or (rounding == "stochastic" and mode == "attach"):
        raise ConfigError(f"rounding {rounding!r} with mode {mode!r}; expected 'nearest', or 'stochastic' with 'fuse'")
    entries = read_stack(adapters, weight=weight, scheduled=True)
    entries = [entry.scheduled(schedule) for entry in entries] if schedule else entries
    refs = [entry.weight for entry in entries]
    check_composite(composite)
    if follows := bool(composite) or not all(ref.is_constant for ref in refs):
        check_schedulable(pipe, mode)
        now, *_ = passes([ref.at(0.0) for ref in refs], composite, 0)
        entries = [replace(entry, weight=ref) for entry, ref in zip(entries, now)]
    draws = seed if rounding == "stochastic" else None
    roots = {part: plain(module) for part, module in parts_of(pipe).items()}
    made: list[Applied] = []  # an interrupt after the lock is let go would lose what is returned, the stack left on
    try:
        apply = partial(_apply, pipe, roots, entries, mode, made, strict=strict, draws=draws)
        applied = alone_on(roots.values(), partial(uncollected, apply))
        if follows:
            applied._follow(pipe, refs, composite)
        return applied
    except BaseException:
        for handle in made:
            handle.remove()
        raise


def _apply(
    pipe: Any,
    roots: Mapping[str, nn.Module],
    entries: list[StackEntry],
    mode: str,
    made: list[Applied],
    *,
    strict: bool,
    draws: int | None,
) -> Applied:
    live = LiveShapes(pipe)
    decisions: dict[str, Mapping[LayerName, Decision]] = {}
    for entry in entries:
        decisions[entry.label] = match(entry.adapter, live, attaching=mode == "attach")
    for entry in entries:
        check_fit(entry, decisions[entry.label], strict=strict)
    riding, written = sort_contributions(decisions[entry.label] for entry in entries)
    for part in dict.fromkeys(key[0] for key in (*riding, *written)):
        check_ready(part, parts_of(pipe)[part], attaching=any(key[0] == part for key in riding))
    modules = {part: model.modules for part, model in live.models.items()}
    name = free_name(list(roots.values()))
    applied = Applied(entries, mode, decisions, name, roots, riding, written, modules, draws)
    made.append(applied)
    try:
        applied._put_on()
        _say_notes(decisions)
        if applied.rounding_losses:
            _say_loss(applied)
        return applied
    except BaseException:
        applied.remove()  # here, while no other thread can see half a stack
        raise


def fit_beside(entries: Sequence[StackEntry], live: LiveShapes, *, strict: bool) -> tuple[Contributions, str]:
    """What each parameter gets of a stack that rides beside the layers as low-rank pairs.

    With it, in words, the first layer that cannot (DoRA, LoHa, a norm); empty if all can.

    Raises:
        MatchError: an adapter does not fit.
    """
    decisions = [match(entry.adapter, live, attaching=True) for entry in entries]
    for entry, of_entry in zip(entries, decisions):
        check_fit(entry, of_entry, strict=strict)
    riding, written = sort_contributions(decisions)
    if not written:
        return riding, ""
    index, name, *_ = next(iter(written.values()))[0]
    return riding, f"{entries[index].label}: {name} is a {type(entries[index].adapter.layers[name]).__name__}"


def check_fit(entry: StackEntry, decisions: Mapping[LayerName, Decision], *, strict: bool) -> None:
    """Refuse an adapter that does not fit; say what is left out where that is wanted.

    Raises:
        MatchError: with the first reason, and how many layers fit.
    """
    wrong = [decision for decision in decisions.values() if isinstance(decision, WrongShape)]
    unmatched = [decision for decision in decisions.values() if isinstance(decision, Unmatched)]
    unused = [decision for decision in decisions.values() if isinstance(decision, Unused)]
    matched = len(decisions) - len(wrong) - len(unmatched) - len(unused)
    if wrong or not matched or (strict and unmatched):
        family = f" (made for {entry.adapter.family})" if entry.adapter.family else ""
        counts = f"{matched} of {len(decisions)} layers fit, {len(wrong)} have another shape"
        refusal = _first_reason(decisions, WrongShape) or _first_reason(decisions, Unmatched) or "it has no layers"
        way_out = "; strict=False leaves out what has no place" if matched and not wrong else ""
        raise MatchError(f"{entry.label}{family} does not fit: {refusal} ({counts}); nothing was changed{way_out}")
    for decision in unused:
        logger.warning("%s: %s", entry.label, decision.reason)
    if unmatched:
        left_out = f"{len(unmatched)} of {len(decisions)} layers left out"
        logger.warning("%s: %s, e.g. %s", entry.label, left_out, _first_reason(decisions, Unmatched))


def _first_reason(decisions: Mapping[LayerName, Decision], kind: type[WrongShape | Unmatched]) -> str | None:
    """The first layer of this kind, and why."""
    return next(
        (f"{name}: {decision.reason}" for name, decision in decisions.items() if isinstance(decision, kind)), None
    )


def _say_notes(decisions: Mapping[str, Mapping[LayerName, Decision]]) -> None:
    for label, of_layers in decisions.items():
        notes = dict.fromkeys(m.note for decision in of_layers.values() for m in matches(decision) if m.note)
        for note in notes:
            logger.info("%s: %s", label, note)


def _say_loss(applied: Applied) -> None:
    loss = applied.rounding_loss
    if loss > 0.01:
        advice = (
            "rounding='stochastic' keeps it on average, mode='attach' in full"
            if applied._seed is None
            else "rounded at random, it is right on average; mode='attach' keeps all of it"
        )
        logger.warning("%.1f %% of the fused change was lost to rounding the weights; %s", 100 * loss, advice)
