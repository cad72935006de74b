"""An adapter as another program reads it exactly: filled up with zeros where that helps, refused where it does not."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import torch

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Vector
from texforce_hub.adapter.lazy import LazyAdapter
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter, Layer, LayerName
from texforce_hub.errors import DialectError
from texforce_hub.families import FAMILIES
from texforce_hub.families.names import part_of
from texforce_hub.files.lazy_mapping import LazyMapping
from texforce_hub.formats.codec.renaming import fit_names
from texforce_hub.formats.dialects.suffixes import is_norm
from texforce_hub.formats.readers import READERS, Reader, has_open_clip

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

Either = TypeVar("Either", bound=Adapter | LazyAdapter)


def fit_reader(adapter: Either, reader: Reader) -> tuple[Either, str]:
    """The same changes as this program reads all of them, and the layout in which it does.

    Zero layers are added where it leaves a change out unless others are beside it.

    Raises:
        DialectError: it has no slot for some layer, or would compute another change; says the way out.
    """
    reasons = []
    for layout in reader.layouts:
        fitted = fit_names(adapter, layout)
        outline = _outline(fitted)
        gaps = list(_find_gaps(reader, outline, layout))
        if not gaps:
            return _with_zeros(fitted, dict(_missing(reader, outline))), layout
        reasons.append(gaps[0])
    raise DialectError(f"{reader.title} cannot read this exactly: {reasons[0]}")


def describe_gaps(adapter: Adapter, layout: str) -> Iterator[str]:
    """What those who read this layout make otherwise of an adapter's layers, one line for each kind of gap."""
    gaps: dict[str, list[str]] = {}
    for reader in _find_readers(adapter, layout):
        for gap in (*_find_gaps(reader, adapter, layout), *_unfilled(reader, adapter)):
            gaps.setdefault(gap, []).append(reader.title)
    for gap, titles in gaps.items():
        yield f"for {', '.join(titles)}: {gap}"


def list_readers(adapter: Adapter, layouts: Collection[str]) -> tuple[str, ...]:
    """The titles of the programs that read all of an adapter's layers, and exactly, as they lie in a file of these."""
    return tuple(
        reader.title
        for reader in READERS.values()
        if all(_reads(reader, adapter, layout) for layout in layouts or [""])
    )


def _reads(reader: Reader, adapter: Adapter, layout: str) -> bool:
    return layout in reader.layouts and not [*_find_gaps(reader, adapter, layout), *_missing(reader, adapter)]


def _find_readers(adapter: Adapter, layout: str) -> list[Reader]:
    """Those whose usual layout it is; of a layout that is nobody's usual one, all who read it."""
    readers = [reader for reader in READERS.values() if layout in reader.layouts and _families(reader, adapter)]
    return [reader for reader in readers if layout == reader.layouts[0]] or readers


def _families(reader: Reader, adapter: Adapter) -> list[str]:
    return [name for name in adapter.family_verdict.candidates if name in reader.families]


def _outline(adapter: Adapter | LazyAdapter) -> Adapter:
    return adapter.outline if isinstance(adapter, LazyAdapter) else adapter


def _find_gaps(reader: Reader, adapter: Adapter, layout: str) -> Iterator[str]:
    families = _families(reader, adapter)
    if not families:
        yield f"it is {adapter.family_verdict.summary}, for which it loads no adapters"
        return
    homeless = [n for n in adapter.layers if not any(reader.has_slot(n, family, layout) for family in families)]
    if homeless:
        yield f"no slot for {len(homeless)} of {len(adapter.layers)} layers, e.g. {homeless[0]}; they are left out"
    norms = [n for n, layer in adapter.layers.items() if isinstance(layer, Decomposed) and layer.axis != reader.axis]
    if norms:
        which = "one magnitude per output row" if reader.axis == "in" else "one magnitude per input"
        yield (
            f"{len(norms)} DoRA layers have {which}, which is computed otherwise there; make it a plain LoRA first: "
            "texforce-hub resize FILE --base BASE --energy 1"
        )


def _unfilled(reader: Reader, adapter: Adapter) -> Iterator[str]:
    """What is read only with zeros beside it, which ``--for`` writes."""
    missing = dict(_missing(reader, adapter))
    if missing:
        yield f"{len(missing)} layers of zeros are missed, without which others are left out; --for writes them"


def _missing(reader: Reader, adapter: Adapter) -> Iterator[tuple[LayerName, Layer]]:
    layers = adapter.layers
    if reader.whole_attention:
        yield from _missing_attention(layers, _families(reader, adapter))
    if reader.paired_norms:
        yield from _missing_norms(layers)


def _missing_attention(layers: Mapping[LayerName, Layer], families: list[str]) -> Iterator[tuple[LayerName, Layer]]:
    """Of blocks of OpenCLIP's towers that are changed in part, the rest, as pairs of zeros."""
    for block in dict.fromkeys(name.rpartition(".")[0] for name in layers if name.endswith(_ATTENTION)):
        if not any(has_open_clip(part_of(block), family) for family in families):
            continue
        names = [f"{block}.{end}" for end in _ATTENTION]
        width, dtype = next((layers[n].shape[1], _dtype(layers[n])) for n in names if n in layers)
        for name in (name for name in names if name not in layers):
            yield name, LowRank(torch.zeros(1, width, dtype=dtype), torch.zeros(width, 1, dtype=dtype))


def _missing_norms(layers: Mapping[LayerName, Layer]) -> Iterator[tuple[LayerName, Layer]]:
    """The scale or the shift of norms of which only the other is changed."""
    for name, layer in layers.items():
        module, _, parameter = name.rpartition(".")
        partner = f"{module}.{'bias' if parameter == 'weight' else 'weight'}"
        known = any(partner in family.weights for family in FAMILIES.values())
        if isinstance(layer, Vector) and is_norm(module) and known and partner not in layers:
            yield partner, Vector(torch.zeros(layer.shape, dtype=_dtype(layer)))


def _dtype(layer: Layer) -> torch.dtype:
    return next(iter(layer.tensors())).dtype


def _with_zeros(adapter: Either, zeros: Mapping[LayerName, Layer]) -> Either:
    if not zeros:
        return adapter
    if isinstance(adapter, Adapter):
        return replace(adapter, layers={**adapter.layers, **zeros})
    shapes = {name: layer.map(lambda tensor: tensor.to("meta")) for name, layer in zeros.items()}
    outline = replace(adapter.outline, layers={**adapter.outline.layers, **shapes})
    layers = LazyMapping(outline.layers, lambda name: zeros[name] if name in zeros else adapter.layers[name])
    return replace(adapter, outline=outline, layers=layers)
