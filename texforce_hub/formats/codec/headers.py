"""What we write into a file's header beside the tensors."""

from collections.abc import Collection, Mapping, Sequence

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


def describe_training(ranks: Sequence[int], kinds: Collection[str], family: str | None, alpha: float) -> dict[str, str]:
    """The ``ss_*`` and ``modelspec.*`` keys that A1111 and its kin show and sort by; every layer has this ``alpha``."""
    plain = set(kinds) <= {"LowRank"}
    dim = str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic"
    metadata = {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": dim,
        "ss_network_alpha": f"{alpha:.9g}",
        "ss_network_args": "{}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    }
    row = None if family is None else FAMILIES[family]
    if row is not None and row.kohya_version is not None:
        metadata["ss_base_model_version"] = row.kohya_version
        metadata["ss_v2"] = str(row.name == "sd2")
    if row is not None and row.architecture is not None:
        metadata["modelspec.architecture"] = f"{row.architecture}/lora"
    return metadata
