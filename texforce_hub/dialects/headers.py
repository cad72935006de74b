"""What we write into a file's header, and into PEFT's config, beside the tensors."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from texforce_hub.families import FAMILIES

_STALE = (
    "lora_adapter_metadata",
    "sshs_",
    "ss_network_",
    "modelspec.hash",
    "texforce_hub.alpha",
    "texforce_hub.dialect",
)
"""Metadata that was true of the file it came from only."""


def keep_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What stays true when an adapter is written anew: provenance, the trainer's facts, the licence."""
    return {key: value for key, value in metadata.items() if not key.startswith(_STALE)}


def describe_training(ranks: Sequence[int], kinds: Collection[str], family: str | None) -> dict[str, str]:
    """The ``ss_*`` and ``modelspec.*`` keys that A1111 and its kin show and sort by."""
    plain = set(kinds) <= {"LowRank"}
    dim = str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic"
    found = {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
        "ss_network_args": "{}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    }
    row = None if family is None else FAMILIES[family]
    if row is not None and row.kohya_version is not None:
        found["ss_base_model_version"] = row.kohya_version
        found["ss_v2"] = str(row.name == "sd2")
    if row is not None and row.architecture is not None:
        found["modelspec.architecture"] = f"{row.architecture}/lora"
    return found


def peft_twin(key: str) -> str | None:
    """The same tensor's name for the other generation of ``transformers``: with or without ``text_model.``."""
    old = "base_model.model.text_model."
    return f"base_model.model.{key.removeprefix(old)}" if key.startswith(old) else None


def peft_config(ranks: Mapping[str, int], *, base: str | None, decomposed: bool) -> dict[str, Any]:
    """``adapter_config.json`` with the keys that PEFT 0.4 already knew; alpha is folded, so it equals the rank.

    ``ranks`` are by module path inside the part.
    """
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {_anywhere(path): other for path, other in ranks.items() if other != rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _targets(list(ranks)),
    }
    if others:
        config |= {"rank_pattern": others, "alpha_pattern": dict(others)}
    return config | ({"use_dora": True} if decomposed else {})


def _anywhere(path: str) -> str:
    """A pattern that PEFT of any age finds at the end of a module's name, whatever ``transformers`` calls its head."""
    return path.removeprefix("text_model.").removeprefix("encoder.")


def _targets(paths: Sequence[str]) -> list[str] | str:
    """The last components where every block has the same, else one pattern that matches exactly these modules."""
    shapes = Counter(re.sub(r"\.\d+\.", ".#.", path) for path in paths)
    last = sorted({path.rpartition(".")[2] for path in paths})
    if len(set(shapes.values())) == 1 and all(name.isidentifier() for name in last) and _text(paths):
        return last
    return "|".join(rf"(.*\.)?{re.escape(_anywhere(path))}" for path in paths)


def _text(paths: Sequence[str]) -> bool:
    return all(path.startswith(("text_model.encoder.", "encoder.block.")) for path in paths)
