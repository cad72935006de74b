"""Tensors that no dialect spells: what came along, what a checkpoint put beside the adapter, and what is lost."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from texforce_hub.families.names import infer_part, publish, unwrap

_BUNDLED = re.compile(r"bundle_emb\..+|emb_params|string_to_param\..*|clip_[lg]|t5xxl|<[^>]*>")
_EMBEDDINGS = re.compile(rf"{_BUNDLED.pattern}|[^.:]+")  # a file may call an embedding by nothing but its word
_WEIGHTS = re.compile(r"(?!lora_|lycoris_)(.+\.)?(base_layer\.)?(weight|bias|position_ids|embedding|scale_shift_table)")
_ADAPTER = re.compile(
    r"lora|hada_|lokr_|dora_scale|\.alpha$|\.magnitude$|\.diff(_b)?$|[wb]_norm$|lycoris", re.IGNORECASE
)
_CHECKPOINTS = ("model.diffusion_model.", "cond_stage_model.", "conditioner.", "first_stage_model.")
_CONSTANT = ".position_ids"


@dataclass(frozen=True, slots=True)
class Leftovers:
    """Names of extras, and one line for each other sort."""

    extras: tuple[str, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]


def find_trained(keys: Iterable[str], layers: Collection[str]) -> tuple[str, str, str] | None:
    """``(kind, example, reason)`` where plain weights in an adapter's file must have been trained beside it.

    A checkpoint holds the weights of the modules that it adapts as well; ``layers`` are those modules.
    """
    weights = [key for key in keys if _is_weight(key) and not key.endswith(_CONSTANT)]
    if not weights or any(key.startswith(_CHECKPOINTS) or _module(key) in layers for key in weights):
        return None
    example = next((key for key in weights if key.endswith(".bias")), weights[0])
    reason = "is a value and not a change, and without the base the difference is not known"
    if all(key.endswith(".bias") for key in weights):
        return "an adapter with trained biases (PEFT's bias 'all' or 'lora_only')", example, reason
    return "an adapter beside modules that were trained whole (PEFT's modules_to_save)", example, reason


def _is_lost(key: str) -> bool:
    """Whether it belongs to an adapter, whose layer no dialect knows."""
    if _BUNDLED.fullmatch(key):
        return False
    return bool(_ADAPTER.search(key)) or ("base_model." in key and not _WEIGHTS.fullmatch(key))


def _is_weight(key: str) -> bool:
    """Whether a plain parameter is called so."""
    return not _is_lost(key) and not _EMBEDDINGS.fullmatch(key) and _WEIGHTS.fullmatch(key) is not None


def _module(key: str) -> str | None:
    """Our name of the module whose weight it is."""
    return _owner(key) if key.endswith(".weight") else None


def _owner(key: str) -> str | None:
    """Our name of the module that something is called after."""
    part, path = unwrap(key.rpartition(".")[0].removesuffix(".base_layer"))
    part = part or infer_part(path)
    return None if part is None else publish(part, path)


def sort_leftovers(keys: Iterable[str], layers: Collection[str] = ()) -> Leftovers:
    """Extras are kept; a checkpoint's plain weights are named and left out; an adapter's tensors must not be lost.

    Whatever else lies beside the halves of one of ``layers`` may be its scale, or anything.
    """
    lost: list[str] = []
    weights: list[str] = []
    extras: list[str] = []
    for key in keys:
        if _is_lost(key) or (not _is_weight(key) and _owner(key) in layers):
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
        advice = "the model was saved with its adapter live: repair fixes it" if live else "a checkpoint holds them too"
        notes.append(f"{_count(weights)} of a whole model left out ({advice})")
    faults = [f"{_count(lost)} that belong to an adapter and name no known layer"] if lost else []
    return Leftovers(tuple(extras), tuple(faults), tuple(notes))


def _count(keys: list[str]) -> str:
    return f"{len(keys)} tensor{'s' if len(keys) > 1 else ''}, e.g. {keys[0]!r:.100}," if keys else "no tensors"
