"""The adapters of several files that are one, as one adapter."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from texforce_hub.adapter.lazy import LazyAdapter
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import DialectError
from texforce_hub.files.lazy_mapping import LazyMapping
from texforce_hub.formats.codec.decoding import describe_reading, equal_layers
from texforce_hub.formats.plan.planning import Plan


def join_lazy(plan: Plan, adapters: Mapping[str, LazyAdapter], *, alpha: float | None = None) -> LazyAdapter:
    """One adapter of those that its files hold; ``plan`` is the joined one, ``adapters`` are by the files' names.

    ``alpha`` is that with which they were decoded. Layers that two files hold are read and compared here.

    Raises:
        DialectError: the plan has faults, or two files hold one layer unequally, or an extra of one name.
    """
    _check_joined(plan)
    owners: dict[str, LazyAdapter] = {}
    for file, adapter in adapters.items():
        for name in adapter.layers:
            if owners.setdefault(name, adapter) is not adapter and not equal_layers(
                owners[name].layers[name], adapter.layers[name]
            ):
                raise DialectError(f"{name} is in {file} and in another file of it, with unequal values; name one file")
    outline = _join_outlines(plan, {file: adapter.outline for file, adapter in adapters.items()}, alpha)
    extras = {key: adapter for adapter in adapters.values() for key in adapter.extras}
    return LazyAdapter(
        outline,
        LazyMapping(owners, lambda name: owners[name].layers[name]),
        LazyMapping(extras, lambda key: extras[key].extras[key]),
    )


def _join_outlines(plan: Plan, outlines: Mapping[str, Adapter], alpha: float | None) -> Adapter:
    """The shapes of all that the files hold."""
    layers = {name: layer for adapter in reversed(list(outlines.values())) for name, layer in adapter.layers.items()}
    extras = [(key, tensor) for adapter in outlines.values() for key, tensor in adapter.extras.items()]
    return Adapter({name: layers[name] for name in plan.layers}, describe_reading(plan, alpha), _once(extras))


def _check_joined(plan: Plan) -> None:
    if plan.faults:
        more = f" (and {len(plan.faults) - 1} more)" if len(plan.faults) > 1 else ""
        raise DialectError(f"{plan.faults[0]}{more}; fix it, or name the one file that you mean")


def _once(extras: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    names = [key for key, _ in extras]
    if len(set(names)) < len(names):
        raise DialectError(f"two of its files hold a tensor {max(names, key=names.count)!r}, no layer; name one file")
    return dict(extras)
