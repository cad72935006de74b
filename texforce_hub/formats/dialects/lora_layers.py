"""What ``diffusers`` 0.21 to 0.34 wrote: ``….q_proj.lora_linear_layer.down.weight``, ``….to_q.lora.down.weight``.

TexForce's, TRL's and SPO's training code writes this; alpha is not stored.
"""

from texforce_hub.errors import DialectError
from texforce_hub.families.names import infer_part, publish, split_part
from texforce_hub.formats.dialects.layout import Dialect, Reading
from texforce_hub.formats.dialects.suffixes import LORA_LAYERS as SUFFIXES
from texforce_hub.formats.dialects.suffixes import split_suffix

_FOREIGN = ("lora_", "lycoris_", "base_model.")


def read_name(key: str) -> Reading | None:
    """A part, a module, and one of the two spellings of a half."""
    split = split_suffix(key, SUFFIXES)
    if split is None:
        return None
    stem, role, _ = split
    named = split_part(stem)
    part, path = named or (infer_part(stem), stem)
    name = None if part is None or path.startswith(_FOREIGN) else publish(part, path)
    return None if name is None else Reading(name, role, stem, assumed=named is None)


def write_name(name: str, role: str, family: str | None = None) -> str:  # noqa: ARG001
    """The spelling these libraries used for the part.

    Raises:
        DialectError: the role is not one of the two halves.
    """
    if role not in ("down", "up"):
        raise DialectError(f"diffusers-layers: no spelling for the {role} of {name}; only plain LoRA can be written")
    infix = "lora_linear_layer" if name.startswith("text_encoder") else "lora"
    return f"{name}.{infix}.{role}.weight"


LORA_LAYERS = Dialect("diffusers-layers", "diffusers 0.21–0.34, LoRA layers", read_name, write_name, one_rank=True)
