"""PEFT's own files: ``base_model.model.text_model.….q_proj.lora_A.weight``, alpha in ``adapter_config.json``.

Old files carry ``text_model.``, those of ``transformers`` 5 do not; training scripts also put a part before
the whole (``unet.base_model.model.…``).
"""

from types import MappingProxyType

from texforce_hub.errors import DialectError
from texforce_hub.families.names import infer_part, path_of, publish, split_part
from texforce_hub.formats.dialects.layout import PLAIN_AND_DORA, Dialect, Reading
from texforce_hub.formats.dialects.suffixes import LORA_AB, LYCORIS, split_suffix, write_suffix
from texforce_hub.formats.peft_config import WEIGHTS

_WRAPPER = "base_model.model."
_SUFFIXES = MappingProxyType({**LORA_AB, **{k: v for k, v in LYCORIS.items() if k.startswith((".hada", ".lokr"))}})


def read_name(key: str) -> Reading | None:
    """The wrapped module; its part is named before the wrapper or follows from the module's own name."""
    split = split_suffix(key, _SUFFIXES)
    if split is None:
        return None
    stem, role, _ = split
    part, path = split_part(stem) or (None, stem)
    if not path.startswith(_WRAPPER):
        return None
    path = path.removeprefix(_WRAPPER)
    assumed = part is None
    part = part or infer_part(path)
    name = None if part is None else publish(part, path)
    return None if name is None else Reading(name, role, stem, assumed=assumed)


def write_name(name: str, role: str, family: str | None = None) -> str:  # noqa: ARG001
    """The wrapped name; a PEFT folder holds one part, so the part is not written.

    Raises:
        DialectError: the role has no spelling here, or no reader could tell the part from the module's name.
    """
    spelled = write_suffix(name, role, _SUFFIXES)
    if spelled is None or spelled[1] not in _SUFFIXES:
        raise DialectError(f"peft: no spelling for the {role} of {name}")
    module, end = spelled
    path = path_of(module)
    if infer_part(path) is None:
        raise DialectError(f"peft: no reader could tell which part {name!r:.100} belongs to; write it as 'diffusers'")
    return f"{_WRAPPER}{path}{end}"


PEFT = Dialect("peft", "PEFT folder", read_name, write_name, kinds=PLAIN_AND_DORA, filename=WEIGHTS)
