"""XLabs' files for Flux: LoRA inside attention processors, ``double_blocks.0.processor.qkv_lora1.down.weight``.

``lora1`` are the image stream's layers, ``lora2`` the text stream's; a block of one stream has no number. No alpha: the
halves' product is the change. Only read: as ``diffusers`` or kohya's layout every program takes them.
"""

import re

from texforce_hub.formats.dialects.layout import Dialect, Reading

_NAME = re.compile(
    r"(?P<stem>(?:diffusion_model\.)?(?P<blocks>double|single)_blocks\.(?P<number>0|[1-9]\d{0,3})\.processor\."
    r"(?P<which>qkv|proj)_lora(?P<stream>[12]?))\.(?P<role>down|up)\.weight"
)
_LAYERS = {
    ("double", "qkv", "1"): "img_attn.qkv",
    ("double", "proj", "1"): "img_attn.proj",
    ("double", "qkv", "2"): "txt_attn.qkv",
    ("double", "proj", "2"): "txt_attn.proj",
    ("single", "qkv", ""): "qkv",
    ("single", "proj", ""): "linear2",
}


def read_name(key: str) -> Reading | None:
    """The layer in the authors' names; XLabs' queries, keys and values of a single block are rows of its first one."""
    match = _NAME.fullmatch(key)
    layer = _LAYERS.get((match["blocks"], match["which"], match["stream"])) if match else None
    if match is None or layer is None:
        return None
    return Reading(f"transformer.{match['blocks']}_blocks.{match['number']}.{layer}", match["role"], match["stem"])


XLABS = Dialect("xlabs", "XLabs, Flux", read_name)
