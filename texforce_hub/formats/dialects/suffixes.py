"""The ends of tensor names, and the role each end gives its tensor."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

LORA_AB = MappingProxyType(
    {
        ".lora_A.weight": "down",
        ".lora_B.weight": "up",
        ".lora_magnitude_vector.weight": "magnitude",
        ".lora_magnitude_vector": "magnitude",
    }
)
LORA_DOWN_UP = MappingProxyType({".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid"})
ALPHA = MappingProxyType({".alpha": "alpha"})
MAGNITUDE = MappingProxyType({".magnitude": "magnitude"})
"""ai-toolkit's end of what PEFT calls ``lora_magnitude_vector``; only read."""
LORA_LAYERS = MappingProxyType(
    {
        ".lora_linear_layer.down.weight": "down",
        ".lora_linear_layer.up.weight": "up",
        ".lora.down.weight": "down",
        ".lora.up.weight": "up",
    }
)
LYCORIS = MappingProxyType(
    {
        ".dora_scale": "dora",
        **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
        ".diff": "diff",
        ".diff_b": ".bias",
        ".w_norm": ".weight",
        ".b_norm": ".bias",
    }
)
"""LyCORIS' ends; the last three change a one-dimensional parameter of the module and name that instead of a role."""


def split_suffix(key: str, suffixes: Mapping[str, str]) -> tuple[str, str, str] | None:
    """``(stem, role, parameter)`` of a name, by its longest known end; ``None`` if it has none.

    ``parameter`` is what the stem lacks to name what is changed: ``.bias`` of ``….q_proj.diff_b``, mostly nothing.
    """
    ends = tuple(suffixes)
    if not key.endswith(ends):  # one call instead of twenty, for most of the names
        return None
    for length in _lengths(ends):
        role = suffixes.get(key[-length:]) if length < len(key) else None
        if role is not None:
            return key[:-length], *(("diff", role) if role in (".bias", ".weight") else (role, ""))
    return None


@cache
def _lengths(ends: tuple[str, ...]) -> list[int]:
    """How long these ends are, the longest first."""
    return sorted(set(map(len, ends)), reverse=True)


def is_norm(module: str) -> bool:
    """Whether a module of our names is a norm: LyCORIS keeps its bias under another end than a linear layer's."""
    return "norm" in module.rpartition(".")[2]


def write_suffix(name: str, role: str, suffixes: Mapping[str, str]) -> tuple[str, str] | None:
    """``(module, end)`` that spell a layer's tensor; ``None`` if these suffixes have no such role."""
    if role == "diff" and name.endswith((".bias", ".weight")):
        module, _, parameter = name.rpartition(".")
        ends = (".w_norm", ".b_norm") if is_norm(module) else (".w_norm", ".diff_b")
        return module, ends[parameter == "bias"]
    end = next((suffix for suffix, known in suffixes.items() if known == role), None)
    return None if end is None else (name, end)
