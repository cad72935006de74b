"""A bare state dict: module names without a part, and the adapter's name inside, ``….lora_A.default.weight``.

What ``save_lora_adapter``, ``torch.save(model.state_dict())`` and accelerate's checkpoints leave behind, and
OneTrainer's output under original names: a U-Net's, with an ``.alpha`` beside each layer.
"""

import re

from texforce_hub.families.names import WRAPPERS, infer_part, publish, split_part, unwrap
from texforce_hub.families.original_unet import is_ldm
from texforce_hub.formats.dialects.layout import Dialect, Reading
from texforce_hub.formats.dialects.suffixes import ALPHA, LORA_AB, LORA_DOWN_UP, LYCORIS, MAGNITUDE, split_suffix

_NAMED = re.compile(r"(?P<path>.+)\.lora_(?P<half>A|B|magnitude_vector)\.(?P<adapter>(?!weight$)[^.]+)(?:\.weight)?")
_HALVES = {"A": "down", "B": "up", "magnitude_vector": "magnitude"}
_SUFFIXES = LORA_AB | LORA_DOWN_UP | LYCORIS | ALPHA | MAGNITUDE


def read_name(key: str) -> Reading | None:
    """A half with an adapter's name in it, or one of a module without a part."""
    match = _NAMED.fullmatch(key)
    if match is not None:
        return _reading(match["path"], _HALVES[match["half"]], "", f"{match['path']} ({match['adapter']})")
    split = split_suffix(key, _SUFFIXES)
    if split is None or split_part(split[0]) or split[0].startswith(WRAPPERS):
        return None
    return _reading(*split, split[0])


def _reading(path: str, role: str, parameter: str, stem: str) -> Reading | None:
    named, path = unwrap(path)
    part = named or infer_part(path) or ("unet" if is_ldm(path) else None)
    name = None if part is None else publish(part, path)
    return None if name is None else Reading(name + parameter, role, stem, assumed=named is None)


STATE_DICT = Dialect("state-dict", "bare state dict", read_name)
