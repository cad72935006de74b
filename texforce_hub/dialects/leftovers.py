"""Tensors that no dialect spells: what came along, what a checkpoint put beside the adapter, and what is lost."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_BUNDLED = re.compile(r"bundle_emb\..+|emb_params|string_to_param\..*|clip_[lg]|t5xxl|<[^>]*>")
_EMBEDDINGS = re.compile(rf"{_BUNDLED.pattern}|[^.:]+")  # a file may call an embedding by nothing but its word
_WEIGHTS = re.compile(
    r"(?!base_model\.|lora_|lycoris_)(.+\.)?(base_layer\.)?(weight|bias|position_ids|embedding|scale_shift_table)"
)
_ADAPTER = re.compile(
    r"lora|hada_|lokr_|dora_scale|\.alpha$|\.diff(_b)?$|[wb]_norm$|lycoris|^base_model\.", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Leftovers:
    """Names of extras, and one line for each other sort."""

    extras: tuple[str, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]


def sort_leftovers(keys: Iterable[str]) -> Leftovers:
    """Extras are kept; a checkpoint's plain weights are named and left out; an adapter's tensors must not be lost."""
    lost: list[str] = []
    weights: list[str] = []
    extras: list[str] = []
    for key in keys:
        if _ADAPTER.search(key) and not _BUNDLED.fullmatch(key):
            lost.append(key)
        elif _EMBEDDINGS.fullmatch(key) or not _WEIGHTS.fullmatch(key):
            extras.append(key)
        else:
            weights.append(key)
    notes = []
    embeddings = [key for key in extras if _EMBEDDINGS.fullmatch(key)]
    unknown = [key for key in extras if not _EMBEDDINGS.fullmatch(key)]
    if embeddings:
        notes.append(f"{_count(embeddings)} kept beside the layers (embeddings)")
    if unknown:
        notes.append(f"{_count(unknown)} of unknown names, kept beside the layers and changing nothing")
    if weights:
        live = any(".base_layer." in key for key in weights)
        advice = "the model was saved with its adapter live: repair mends it" if live else "a checkpoint holds them too"
        notes.append(f"{_count(weights)} of a whole model left out ({advice})")
    faults = [f"{_count(lost)} that belong to an adapter and name no known layer"] if lost else []
    return Leftovers(tuple(extras), tuple(faults), tuple(notes))


def _count(keys: list[str]) -> str:
    return f"{len(keys)} tensor{'s' if len(keys) > 1 else ''}, e.g. {keys[0]!r}," if keys else "no tensors"
