"""What is asked of a merge, as one value: a call, a recipe and a command line all become a :class:`MergeRequest`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from texforce_hub.device import Dtype, given_dtype
from texforce_hub.errors import MergeError
from texforce_hub.hub.block_weights import is_number, numbers_in
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.refs.stack import Stack
from texforce_hub.hub.stack import is_pair
from texforce_hub.merge.methods.registry import Method, find_method
from texforce_hub.merge.resize import Limits


@dataclass(frozen=True, slots=True, eq=False)
class MergeRequest:
    """Everything that decides a merge's result; on which device it is computed is not part of it.

    sources: adapters or references, or ``(adapter or reference, weight)`` pairs, a weight being a number or a mapping
        from parts, blocks or patterns to numbers; or a stack as text, ``"A:0.7 + B:-0.3"``
    method: a name in ``texforce_hub.merge.methods.METHODS``
    options: the method's own; those that are not given get their defaults
    rank: the largest rank of a layer; ``svd`` without any limit takes the largest rank among the sources
    energy: the smallest rank that keeps this share of a layer's squared norm, in (0, 1]
    max_total_rank: the sum of the ranks, spent where it keeps the most
    part_weights, layer_weights: factors by part, block or pattern (``{"unet": 0.5}``), on all sources
    seed: of the random methods; with a layer's name it decides every draw
    dtype: of the result; ``None``: float32

    Raises:
        MergeError: sources, weights, options or limits that cannot be merged; the message says which.
        ConfigError: no dtype of this name.
    """

    sources: Any
    method: str = "svd"
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    energy: float | None = None
    max_total_rank: int | None = None
    part_weights: Mapping[str, float] = field(default_factory=dict)
    layer_weights: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        options = MappingProxyType(self.definition.checked(self.options))
        if self.method == "cat" and self.limits.any:
            raise MergeError("'cat' is the exact sum at the sum of the ranks; for a rank or an energy take 'svd'")
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "dtype", given_dtype(self.dtype))
        object.__setattr__(self, "sources", tuple(_check_sources(self.sources)))

    @property
    def definition(self) -> Method:
        """The method itself."""
        return find_method(self.method)

    @property
    def limits(self) -> Limits:
        """What bounds the ranks."""
        return Limits(self.rank, self.energy, None, self.max_total_rank)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was asked for beside sources, method and seed, as a recipe stores it: without what was not."""
        values = {
            "rank": self.rank,
            "energy": self.energy,
            "max_total_rank": self.max_total_rank,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "part_weights": dict(self.part_weights) or None,
            "layer_weights": dict(self.layer_weights) or None,
        }
        return {name: value for name, value in values.items() if value is not None}


def _check_sources(sources: Any) -> list[Any]:
    if isinstance(sources, str):
        return list(Stack.parse(sources).refs)
    if isinstance(sources, Stack):
        return list(sources.refs)
    if is_pair(sources):
        return [sources]
    if not isinstance(sources, Sequence) or not sources:
        raise MergeError(f"sources {type(sources).__name__}; expected a list of (adapter or reference, weight)")
    items = [tuple(item) if isinstance(item, list) else item for item in sources]  # as a recipe stores pairs
    for item in items:
        if not isinstance(item, tuple):
            continue
        if not is_pair(item) or isinstance(item[1], bool):
            raise MergeError(f"a source of {len(item)} entries; expected (adapter or reference, weight)")
        if not isinstance(item[1], AdapterRef) and not all(is_number(number) for number in numbers_in(item[1])):
            raise MergeError(f"weight {item[1]!r:.80}; expected a finite number for each source")
    return items
