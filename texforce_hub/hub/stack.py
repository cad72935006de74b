"""A stack of adapters as apply, merge's callers and the command line give it: read, labelled, weighted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, cast

from texforce_hub.adapter.finite import check_finite
from texforce_hub.adapter.lazy import LazyAdapter
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import ConfigError, RefError
from texforce_hub.hub.block_weights import flatten_blocks, is_number, numbers_in
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.refs.stack import make_unique

Weight = float | Mapping[str, Any] | AdapterRef
"""Of all layers, by part, block or pattern, or those of a reference, its schedule included.

A U-Net's may be a mapping of its blocks, as ``diffusers`` takes it: ``{"unet": {"down": 0.5, "up": {"block_1": 1}}}``.
"""
Source = str | PathLike[str] | AdapterRef | Adapter
Item = Source | tuple[Source, Weight]
Reader = Callable[[AdapterRef], Adapter | LazyAdapter]


@dataclass(frozen=True, slots=True)
class StackEntry:
    """One adapter of a stack: its label, itself with its numbers or in its file, and how much of each layer."""

    label: str
    content: Adapter | LazyAdapter
    weight: AdapterRef

    @property
    def adapter(self) -> Adapter:
        """The adapter; of one that stays in its file the outline: names, shapes and scales, no numbers."""
        return self.content.outline if isinstance(self.content, LazyAdapter) else self.content

    @property
    def item(self) -> tuple[Adapter, Weight]:
        """The entry as ``apply_adapter`` takes it: nothing is read again, its schedule stays."""
        return self.adapter, replace(self.weight, source="adapter", name=None)

    def scheduled(self, schedule: str) -> "StackEntry":
        """The same entry whose weight changes over the denoising steps, unless it has a schedule already.

        ``schedule`` is a window, ``[0-0.4]``, or weights at shares of the steps, ``0@0,1@0.3``.

        Raises:
            ConfigError: something else, or weights at shares of the steps beside a weight.
        """
        if not isinstance(cast(Any, schedule), str):
            raise ConfigError(f"schedule {schedule!r:.80}; expected a text such as '[0-0.4]' or '0@0,1@0.3'")
        if not self.weight.is_constant:
            return self
        try:
            return replace(self, weight=self.weight.scheduled(schedule))
        except RefError as error:
            raise ConfigError(f"{self.label}: {error}") from error

    def reweighted(self, weight: Weight) -> "StackEntry":
        """The same entry with another weight, in the same window of the steps.

        Raises:
            ConfigError: a weight that is not finite, a pattern that fits no layer, or weights at shares of the steps,
                which one weight would replace.
        """
        if self.weight.ramp or self.weight.ramps:
            raise ConfigError(f"{self.weight}: it brings weights over the steps, and {weight!r} beside them; give one")
        weights = _weights(weight, self.label, self.adapter)
        if not isinstance(weight, AdapterRef):
            weights = replace(weights, source=self.weight.source, name=self.weight.name)
        return replace(self, weight=weights if self.weight.is_constant else replace(weights, window=self.weight.window))


def read_stack(
    adapters: Item | Sequence[Item], *, weight: Weight = 1.0, read: Reader = read_adapter, scheduled: bool = False
) -> list[StackEntry]:
    """The stack's entries, adapters read and weights checked; labels are made unique.

    ``weight`` is for the items that bring none; ``read`` may be ``open_adapter`` for adapters that stay in their files,
    or one of outlines where no values are needed. ``scheduled``: weights may change over the denoising steps.

    Raises:
        ConfigError: no adapter, or an impossible weight.
        AdapterError: NaN or infinity in a layer.
    """
    many = isinstance(adapters, list | tuple) and not is_pair(adapters)
    items: list[Any] = list(adapters) if many else [adapters]  # type: ignore[arg-type]
    if not items:
        raise ConfigError("an empty stack; expected at least one adapter")
    entries = [_read_entry(item, weight, read) for item in items]
    for entry in entries:
        if not (scheduled or entry.weight.is_constant):
            raise ConfigError(f"{entry.weight}: its weight changes over the denoising steps; here one holds for all")
    labels = make_unique(entry.label for entry in entries)
    return [replace(entry, label=label) for entry, label in zip(entries, labels)]


def is_pair(item: Any) -> bool:
    """Whether this is one adapter and its weight, and not a stack of two.

    A reference beside an adapter that is read already says how much of it; beside another reference it is the second
    of two adapters.
    """
    if not isinstance(item, tuple) or len(item) != 2:
        return False
    kinds = Real | Mapping | AdapterRef if isinstance(item[0], Adapter | LazyAdapter) else Real | Mapping
    return isinstance(item[1], kinds)


def _read_entry(item: Any, default: Weight, read: Reader) -> StackEntry:
    source, weight = item if is_pair(item) else (item, None)
    if isinstance(source, Adapter):
        entry = StackEntry("adapter", source, AdapterRef("adapter"))
        check_finite(source)
    else:
        ref = source if isinstance(source, AdapterRef) else _parsed(source)
        entry = StackEntry(ref.label, read(ref), ref)
    if weight is None and (entry.weight.weight != 1.0 or entry.weight.parts or not entry.weight.is_constant):
        check_patterns(entry.label, entry.adapter, entry.weight)
        return entry
    return entry.reweighted(default if weight is None else weight)


def _parsed(source: Any) -> AdapterRef:
    if isinstance(source, str):
        return AdapterRef.parse(source)
    if not isinstance(source, PathLike):
        raise ConfigError(f"{_kind(source)} is no adapter; {_way_out(source)}")
    path = Path(source)
    return AdapterRef(str(path) if path.is_absolute() else f"./{path}")


def _kind(value: Any) -> str:
    shown = f" ({value!r:.40})" if isinstance(value, Real | bytes | tuple) or value is None else ""
    return f"{type(value).__name__}{shown}"


def _way_out(source: Any) -> str:
    if isinstance(getattr(source, "adapter", None), Adapter):
        return "give its .adapter"
    if isinstance(source, Mapping):
        return "give a list of (adapter, weight) pairs"
    if isinstance(source, tuple | list):
        return "a stack is one list of adapters or (adapter, weight) pairs, a weight being a number or a mapping"
    return "expected a reference ('me/style:0.7'), a path, what read_adapter gives, or a list of them"


def _weights(weight: Any, label: str, adapter: Adapter) -> AdapterRef:
    if isinstance(weight, AdapterRef):
        check_patterns(label, adapter, weight)
        return weight
    if not all(is_number(number) for number in numbers_in(weight)) or isinstance(weight, list | tuple):
        raise ConfigError(f"{label}: weight {weight!r:.80}; expected a finite number, or a mapping of parts to numbers")
    if not isinstance(weight, Mapping):
        return AdapterRef("adapter", weight=float(weight))
    try:
        flat: dict[Any, Any] = flatten_blocks(weight, adapter.layers)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from error
    if bad := [part for part, number in flat.items() if not isinstance(part, str) or not is_number(number)]:
        raise ConfigError(f"{label}: weight of {bad[0]!r:.80}; expected a part, block or pattern and one finite number")
    ref = AdapterRef("adapter", parts=tuple((part, float(number)) for part, number in flat.items()))
    check_patterns(label, adapter, ref)
    return ref


def check_patterns(label: str, adapter: Adapter, ref: AdapterRef) -> None:
    """Refuse a weight of a part or pattern that no layer of the adapter has.

    Raises:
        ConfigError: names it, and the parts that there are.
    """
    for part, _ in (*ref.parts, *ref.ramps):
        only = AdapterRef("adapter", parts=((part, 0.0),))
        if all(only.weight_of(name) != 0.0 for name in adapter.layers):
            parts = ", ".join(adapter.parts)
            raise ConfigError(f"{label}: no layer is covered by {part!r}; its parts are {parts}, a pattern needs *")


def reweighted(entries: Sequence[StackEntry], weights: Mapping[str, Weight] | Sequence[Weight]) -> list[StackEntry]:
    """The entries with new weights, by label or in order.

    Raises:
        ConfigError: an unknown label, another number of weights, or an impossible weight.
    """
    labels, given = [entry.label for entry in entries], cast("Any", weights)
    if not isinstance(given, Mapping | Sequence) or isinstance(given, str):
        raise ConfigError(
            f"weights {_kind(weights)}; expected a list of {len(labels)}, or a mapping of {', '.join(labels)}"
        )
    if not isinstance(weights, Mapping):
        if len(weights) != len(entries):
            raise ConfigError(f"{len(weights)} weights for a stack of {len(entries)}: {', '.join(labels)}")
        weights = dict(zip(labels, weights))
    if unknown := sorted(set(weights) - set(labels)):
        raise ConfigError(f"no adapter {unknown[0]!r} in the stack; it has {', '.join(labels)}")
    return [entry.reweighted(weights[entry.label]) if entry.label in weights else entry for entry in entries]
