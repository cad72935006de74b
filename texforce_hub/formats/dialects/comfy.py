"""ComfyUI's and OneTrainer's spelling: ``text_encoders.clip_l.transformer.…``, ``diffusion_model.…``.

Any LoRA half's end may follow, with an ``.alpha`` beside it. U-Nets and transformers are named as in the original code.
"""

from texforce_hub.errors import DialectError
from texforce_hub.families import FAMILIES
from texforce_hub.families.names import infer_part, publish
from texforce_hub.families.original_transformer import is_original
from texforce_hub.families.original_unet import is_ldm, to_ldm
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

_WRITTEN = LORA_AB | ALPHA | LYCORIS
_READ = _WRITTEN | LORA_DOWN_UP | LORA_LAYERS | MAGNITUDE
_TOWERS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}


def read_name(key: str) -> Reading | None:
    """A tower's or the diffusion model's layer."""
    split = split_suffix(key, _READ)
    if split is None:
        return None
    stem, role, parameter = split
    head, _, rest = stem.partition(".")
    part: str | None = None
    if head == "text_encoders":
        tower, _, rest = rest.partition(".transformer.")
        part = _TOWERS.get(tower)
    elif head == "diffusion_model":
        part = "unet" if is_ldm(rest) or infer_part(rest) == "unet" else "transformer"
    name = publish(part, rest) if part and rest else None
    return None if name is None else Reading(name + parameter, role, stem)


def write_name(name: str, role: str, family: str | None = None) -> str:
    """The tower's name comes from the family's row, CLIP-L's where none is known.

    Raises:
        DialectError: the role or the layer has no spelling here.
    """
    spelled = write_suffix(name, role, _WRITTEN)
    part, _, path = (spelled or ("", ""))[0].partition(".")
    prefix = _prefix(part, path, family)
    if part == "unet":
        path = to_ldm(path, family) or ""
    if part == "transformer" and not is_original(_module(path)):
        raise DialectError(
            f"comfy: ComfyUI knows a transformer's layers by their original names in this layout, and {name} is "
            "diffusers' name; write it as 'kohya', which it reads"
        )
    if spelled is None or not path:
        raise DialectError(f"comfy: no spelling for the {role} of {name}")
    return f"{prefix}.{path}{spelled[1]}"


def _module(path: str) -> str:
    return path.removesuffix(".weight").removesuffix(".bias")


def _prefix(part: str, path: str, family: str | None) -> str:
    if not part.startswith("text_encoder"):
        return "diffusion_model"
    if path.startswith("encoder.block."):
        return "text_encoders.t5xxl.transformer"
    known = {} if family is None else FAMILIES[family].comfy
    return f"text_encoders.{known.get(part) or ('clip_g' if part == 'text_encoder_2' else 'clip_l')}.transformer"


COMFY = Dialect(
    *("comfy", "ComfyUI, OneTrainer", read_name, write_name),
    kinds=EVERY_KIND,
    stores_alpha=True,
    carries_extras=True,
    filename="lora.safetensors",
)
