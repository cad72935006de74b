"""The adapters of several files that are one, as one adapter."""

from collections.abc import Mapping

from texforce_hub.adapter import Adapter, Layer
from texforce_hub.codec.decoding import describe_reading, equal_layers
from texforce_hub.dialects import Plan
from texforce_hub.errors import DialectError


def join_adapters(plan: Plan, adapters: Mapping[str, Adapter], *, alpha: float | None = None) -> Adapter:
    """One adapter of those that its files hold; ``plan`` is the joined one, ``adapters`` are by the files' names.

    ``alpha`` is that with which they were decoded.

    Raises:
        DialectError: the plan has faults, or two files hold one layer, or one extra, unequally.
    """
    if plan.faults:
        more = f" (and {len(plan.faults) - 1} more)" if len(plan.faults) > 1 else ""
        raise DialectError(f"{plan.faults[0]}{more}; mend it, or name the one file that you mean")
    layers: dict[str, Layer] = {}
    for file, adapter in adapters.items():
        for name, layer in adapter.layers.items():
            if not equal_layers(layers.setdefault(name, layer), layer):
                raise DialectError(f"{name} is in {file} and in another file of it, with unequal values; name one file")
    extras = {f"{file}|{key}": tensor for file, one in adapters.items() for key, tensor in one.extras.items()}
    names = [key.partition("|")[2] for key in extras]
    if len(set(names)) < len(names):
        raise DialectError(f"two of its files hold a tensor {max(names, key=names.count)!r}, no layer; name one file")
    return Adapter(layers, describe_reading(plan, alpha), dict(zip(names, extras.values(), strict=True)))
