"""What ``diffusers`` 0.12 to 0.20 wrote: LoRA halves inside attention processors (DPOK, ReFL, DDPO, D3PO).

``….attn1.processor.to_q_lora.down.weight`` in the U-Net, with or without ``unet.``; in the text encoder
``….self_attn.to_q_lora.down.weight``, or in 0.16 all four under each projection, of which it used only its own.
No alpha: the halves' product is the change.
"""

import re

from texforce_hub.errors import DialectError
from texforce_hub.families.names import infer_part, publish, split_part
from texforce_hub.formats.dialects.layout import Dialect, Reading

_NAME = re.compile(r"(?P<stem>(?P<path>.+?)(\.processor)?\.to_(?P<which>q|k|v|out)_lora)\.(?P<role>down|up)\.weight")
_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_UNET = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


def read_name(key: str) -> Reading | None:
    """The module that the attention's half belongs to; role ``unused`` for what 0.16 stored and never used."""
    match = _NAME.fullmatch(key)
    if match is None:
        return None
    named = split_part(match["path"])
    part, path = named or (infer_part(match["path"]), match["path"])
    if part is None:
        return None
    module, role = _module(part, path, match["which"]), match["role"]
    last = path.rpartition(".")[2]
    if last in _TEXT.values():
        module, role = path, role if last == _TEXT[match["which"]] else "unused"
    name = publish(part, module)
    return None if name is None else Reading(name, role, match["stem"], assumed=named is None)


def _module(part: str, attention: str, which: str) -> str:
    names = _TEXT if part.startswith("text_encoder") else _UNET
    return f"{attention}.{names[which]}"


def write_name(name: str, role: str, family: str | None = None) -> str:  # noqa: ARG001
    """The prefixed spelling (0.17 to 0.20).

    Raises:
        DialectError: the layer is no attention projection, or the role not one of the two halves.
    """
    text = name.startswith("text_encoder")
    for which, module in (_TEXT if text else _UNET).items():
        if name.endswith(f".{module}") and role in ("down", "up"):
            attention = name.removesuffix(f".{module}") + ("" if text else ".processor")
            return f"{attention}.to_{which}_lora.{role}.weight"
    raise DialectError(f"attention-processors: no spelling for the {role} of {name}, no attention projection")


ATTENTION_PROCESSORS = Dialect(
    *("attention-processors", "diffusers 0.12–0.20, attention processors", read_name, write_name), one_rank=True
)
