"""Adapter + dialect → tensors, metadata, config."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from texforce_hub import __version__
from texforce_hub.adapter.lazy import LazyAdapter, outline_adapter
from texforce_hub.adapter.value import Adapter, Layer, LayerName
from texforce_hub.errors import DialectError
from texforce_hub.families import FAMILIES
from texforce_hub.families.recognition import FamilyVerdict
from texforce_hub.formats.codec.fitting import describe_gaps
from texforce_hub.formats.codec.headers import describe_training, keep_metadata
from texforce_hub.formats.codec.peft import describe_folder
from texforce_hub.formats.codec.renaming import fit_names
from texforce_hub.formats.codec.spelling import Spelling, choose_spelling

logger = logging.getLogger("texforce_hub")

_LONG = 100  # characters of a stranger's name in a message


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a file will hold: tensors by the dialect's names, header metadata, PEFT's config if it has one.

    ``left_out`` names extras that this layout's readers would stumble over.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None
    filename: str
    left_out: tuple[str, ...] = field(default=())


def encode(adapter: Adapter, dialect: str, *, dtype: torch.dtype | None = None) -> Encoded:
    """An adapter in a dialect's names; tensors keep their dtype unless one is given.

    Raises:
        DialectError: no such dialect, one that is only read, or a layer that it has no spelling for.
        AdapterError: a value that the dtype cannot hold.
    """
    adapter = fit_names(adapter, dialect)
    outline = outline_adapter(adapter)
    verdict = outline.family_verdict
    spelling = _spell(outline, dialect, verdict, dtype)
    layout = spelling.layout
    layers = {name: spelling.fit_layer(name, layer) for name, layer in outline.layers.items()}
    config = describe_folder(layers, adapter) if dialect == "peft" else None
    metadata = keep_metadata(adapter.metadata) | _provenance(verdict.family)
    _warn_of_diffusers(dialect, layers)
    for gap in describe_gaps(outline, dialect):
        logger.warning("%s: %s", dialect, gap)
    if spelling.alpha is not None:
        metadata |= describe_training(_ranks(layers), _kinds(layers), _shown_under(verdict), spelling.alpha)
    tensors = _spell_layers(adapter.layers, spelling)
    extras = dict(adapter.extras) if layout.carries_extras else {}
    left_out = tuple(name for name in adapter.extras if name not in extras)
    if left_out:
        named = ", ".join(repr(name)[:_LONG] for name in left_out[:3]) + (" …" if len(left_out) > 3 else "")
        logger.warning("%s: %d extra tensors have no place in this layout: %s", dialect, len(left_out), named)
    if extras.keys() & tensors.keys():
        raise DialectError(
            f"{dialect}: an extra is called {min(extras.keys() & tensors.keys())!r}, as a layer's tensor is"
        )
    return Encoded(tensors | extras, metadata, config, layout.filename, left_out)


def encode_lazily(
    adapter: LazyAdapter, dialect: str, *, dtype: torch.dtype | None = None
) -> tuple[Encoded, Iterator[tuple[str, Tensor]]]:
    """As :func:`encode`, of an adapter that stays in its file: an outline, then the tensors one layer at a time.

    Raises:
        DialectError, AdapterError: as :func:`encode`; what only the numbers tell, while they come.
    """
    adapter = fit_names(adapter, dialect)
    spelling = _spell(adapter.outline, dialect, adapter.outline.family_verdict, dtype)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, layer in adapter.layers.items():
            yield from spelling.spell_layer(name, layer)
        if spelling.layout.carries_extras:
            yield from adapter.extras.items()

    return encode(adapter.outline, dialect, dtype=dtype), stream()


def _shown_under(verdict: FamilyVerdict) -> str | None:
    """The family for the header: A1111 takes a file for SD1 that names none, and hides it from other models."""
    if verdict.family is None and "sdxl" in verdict.candidates and "sd1" not in verdict.candidates:
        logger.warning(
            "%s: the header says SDXL, so that A1111 shows it there; --family says otherwise", verdict.summary
        )
        return "sdxl"
    return verdict.family


def _spell(adapter: Adapter, dialect: str, verdict: FamilyVerdict, dtype: torch.dtype | None) -> Spelling:
    """How it is written; an adapter of no known family as SD1's, but only if SD1 has all of its parts."""
    family = verdict.family or ("sd1" if FAMILIES["sd1"].parts.keys() >= set(adapter.parts) else None)
    return choose_spelling(adapter, dialect, family, dtype)


def _spell_layers(layers: Mapping[LayerName, Layer], spelling: Spelling) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for key, tensor in spelling.spell_layer(name, layer):
            if key in tensors:
                raise DialectError(
                    f"{spelling.layout.name}: two layers would be written as {key!r}, one of them {name}"
                )
            tensors[key] = tensor
    return tensors


def _warn_of_diffusers(dialect: str, layers: Mapping[LayerName, Layer]) -> None:
    """Say where ``diffusers`` cannot load a text encoder's layers from a layout that it otherwise reads."""
    for part in ("text_encoder", "text_encoder_2"):
        modules = {name.rpartition(".")[2] for name in layers if name.startswith(f"{part}.")}
        attention = modules & {"q_proj", "k_proj", "v_proj", "out_proj"}
        if dialect == "kohya" and attention and "out_proj" not in attention:
            lost, other = "leaves out q_proj, k_proj and v_proj of such a file, or refuses it", "diffusers"
        elif dialect == "diffusers" and modules & {"fc1", "fc2"} and not attention:
            lost, other = "refuses such a file", "kohya"
        else:
            continue
        missing = "out_proj" if attention else "attention layer"
        logger.warning("%s: no %s in %s: diffusers %s; write it as %r for it", dialect, missing, part, lost, other)


def _ranks(layers: Mapping[LayerName, Layer]) -> list[int]:
    return [layer.rank for layer in layers.values() if layer.rank is not None]


def _kinds(layers: Mapping[LayerName, Layer]) -> frozenset[str]:
    return frozenset(type(layer).__name__ for layer in layers.values())


def _provenance(family: str | None) -> dict[str, str]:
    return {"format": "pt", "texforce_hub.version": __version__} | ({"texforce_hub.family": family} if family else {})
