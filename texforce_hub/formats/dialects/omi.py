"""OMI's spelling, which OneTrainer once wrote: ``clip_l.text_model.…``, ``t5.encoder.…``, ``unet.input_blocks.…``.

Any LoRA half's end may follow, with an ``.alpha`` beside it. The U-Net is named as in the original code. Only read:
no other tool loads it.
"""

from texforce_hub.families.names import publish
from texforce_hub.families.original_unet import is_ldm
from texforce_hub.formats.dialects.layout import Dialect, Reading
from texforce_hub.formats.dialects.suffixes import ALPHA, LORA_AB, LORA_DOWN_UP, LYCORIS, split_suffix

_READ = LORA_AB | LORA_DOWN_UP | ALPHA | LYCORIS
_TOWERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"}


def read_name(key: str) -> Reading | None:
    """A tower's layer, or one of the U-Net in its original name."""
    split = split_suffix(key, _READ)
    if split is None:
        return None
    stem, role, parameter = split
    head, _, path = stem.partition(".")
    part = "unet" if head == "unet" and is_ldm(path) else _TOWERS.get(head)
    name = publish(part, path) if part and path else None
    return None if name is None else Reading(name + parameter, role, stem)


OMI = Dialect("omi", "OMI, as OneTrainer once wrote it", read_name)
