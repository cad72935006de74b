"""What ``diffusers`` writes today: ``text_encoder.….q_proj.lora_A.weight``, part by part, alpha folded."""

from texforce_hub.errors import DialectError
from texforce_hub.families.names import publish, split_part
from texforce_hub.families.original_unet import is_ldm
from texforce_hub.formats.dialects.layout import PLAIN_AND_DORA, Dialect, Reading
from texforce_hub.formats.dialects.suffixes import (
    ALPHA,
    LORA_AB,
    LORA_DOWN_UP,
    LYCORIS,
    MAGNITUDE,
    split_suffix,
    write_suffix,
)

_WRITTEN = LORA_AB | LYCORIS | ALPHA
_READ = _WRITTEN | LORA_DOWN_UP | MAGNITUDE
_FOREIGN = ("base_model.", "lora_", "lycoris_")


def read_name(key: str) -> Reading | None:
    """``text_encoder.….q_proj.lora_A.weight``; ``transformers`` 5's flat spelling counts as well."""
    split = split_suffix(key, _READ)
    named = split_part(split[0]) if split else None
    if split is None or named is None or named[1].startswith(_FOREIGN):
        return None
    if named[0] == "unet" and is_ldm(named[1]):  # OMI's
        return None
    name = publish(*named)
    return None if name is None else Reading(name + split[2], split[1], split[0])


def write_name(name: str, role: str, family: str | None = None) -> str:  # noqa: ARG001  # one spelling for all
    """The tensor's name.

    Raises:
        DialectError: the role has no spelling here.
    """
    spelled = write_suffix(name, role, _WRITTEN)
    if spelled is None:
        raise DialectError(f"diffusers: no spelling for the {role} of {name}")
    return "".join(spelled)


DIFFUSERS = Dialect(
    "diffusers", "diffusers, today's spelling", read_name, write_name, kinds=PLAIN_AND_DORA, one_rank=True
)
