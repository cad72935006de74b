"""What kohya's sd-scripts, A1111 and LyCORIS write: flattened names, one ``.alpha`` a module.

``lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight``; ``lora_te1_``/``lora_te2_`` for two text
encoders, ``lora_te3_`` for T5, ``lora_unet_`` for U-Nets (in ``diffusers``' names or the original ones) and for
transformers in their authors' names, ``lora_transformer_`` for transformers in ``diffusers``' names, ``lycoris_`` for
whatever the module's own name says.
"""

import re

from texforce_hub.errors import DialectError
from texforce_hub.families import FAMILIES
from texforce_hub.families.names import part_of, path_of, publish
from texforce_hub.families.original_transformer import is_original
from texforce_hub.families.original_unet import to_ldm
from texforce_hub.families.text import T5Encoder
from texforce_hub.formats.dialects.flat import flatten, unflatten
from texforce_hub.formats.dialects.layout import EVERY_KIND, Dialect, Reading
from texforce_hub.formats.dialects.suffixes import (
    ALPHA,
    LORA_AB,
    LORA_DOWN_UP,
    LORA_LAYERS,
    LYCORIS,
    MAGNITUDE,
    split_suffix,
    write_suffix,
)

_WRITTEN = LORA_DOWN_UP | ALPHA | LYCORIS
_READ = _WRITTEN | LORA_AB | LORA_LAYERS | MAGNITUDE | {"_lora.down.weight": "down", "_lora.up.weight": "up"}
_PREFIX = re.compile(r"(?:unet\.|text_encoder\.|transformer\.)?(lora_te[123]?|lora_unet|lora_transformer|lycoris)_(.+)")
_TEXT_PARTS = {
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lycoris": "text_encoder",
}
_NUMBERED = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"}
_LDM_FAMILIES = ("sdxl", "sdxl-refiner")


def read_name(key: str) -> Reading | None:
    """The layer whose dots were flattened; ``None`` also where no known model has such a layer."""
    split = split_suffix(key, _READ)
    match = _PREFIX.fullmatch(split[0]) if split else None
    if split is None or match is None:
        return None
    kind, path = unflatten(match[2]) or (None, "")
    part = None if kind is None else _part(match[1], kind)
    name = None if part is None else publish(part, path)
    if name is None:
        return None
    left_open = match[1] == "lora_te" and kind == "clip"  # SD1's or SD2's only one, or the refiner's second
    return Reading(name + split[2], split[1], split[0], assumed=left_open)


def _part(prefix: str, kind: str) -> str | None:
    """Where a kind of module lives: T5 counts as the third text encoder whatever number its trainer gave it."""
    if kind in ("unet", "transformer"):
        return kind if prefix in ("lora_unet", "lora_transformer", "lycoris") else None
    if prefix not in _TEXT_PARTS:
        return None
    return "text_encoder_3" if kind == "t5" else _TEXT_PARTS[prefix]


def write_name(name: str, role: str, family: str | None = None) -> str:
    """The flattened name with this family's prefixes; SDXL's U-Net in its original names, as kohya does.

    Raises:
        DialectError: the role has no spelling here, or no reader could tell the layer from its flat name.
    """
    spelled = write_suffix(name, role, _WRITTEN)
    if spelled is None:
        raise DialectError(f"kohya: no spelling for the {role} of {name}")
    part, path = part_of(spelled[0]), path_of(spelled[0])
    if part == "unet" and family in _LDM_FAMILIES:
        path = to_ldm(path, family) or path
    key = f"{_prefix(part, path, family)}_{flatten(path)}{spelled[1]}"
    reading = read_name(key)
    if reading is None or path_of(reading.name) != path_of(name):
        raise DialectError(f"kohya: {name} cannot be flattened so that readers find it again; write it as 'diffusers'")
    return key


def _prefix(part: str, path: str, family: str | None) -> str:
    if part == "transformer":  # readers look for a prefix of its own before diffusers' names
        return "lora_unet" if is_original(path) else "lora_transformer"
    row = None if family is None else FAMILIES[family]
    prefixes = {} if row is None else row.kohya
    if path.startswith("encoder.block.") and (row is None or not isinstance(row.parts.get(part), T5Encoder)):
        return "lora_te3"
    return prefixes.get(part) or _NUMBERED.get(part) or "lora_unet"


KOHYA = Dialect(
    *("kohya", "kohya sd-scripts, A1111, LyCORIS", read_name, write_name),
    kinds=EVERY_KIND,
    stores_alpha=True,
    carries_extras=True,
    filename="lora.safetensors",
)
