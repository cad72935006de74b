"""Names whose dots became underscores, as kohya's trainers write them, and the way back without guessing.

``transformer_blocks_0_attn1_to_out_0`` has many readings but one that names a layer. The layers of all families,
numbers replaced by ``#``, are the table: a flat name is looked up in it, whatever its numbers are.
"""

import re
from collections.abc import Iterator
from functools import cache, lru_cache

from texforce_hub.families import FAMILIES
from texforce_hub.families.original_unet import from_ldm, is_ldm, to_ldm
from texforce_hub.families.text import ClipEncoder, T5Encoder
from texforce_hub.families.transformer import Transformer
from texforce_hub.families.unet import UNet

_NUMBER = re.compile(r"(?<=[._])[0-9]+(?=[._]|$)")
_PADDED = re.compile(r"0[0-9]+")


def flatten(path: str) -> str:
    """The name with underscores for dots."""
    return path.replace(".", "_")


@lru_cache(maxsize=1 << 14)  # a layer's tensors share its name, and files for one base their layers
def unflatten(flat: str) -> tuple[str, str] | None:
    """``(kind, path)`` of a flat name: kind is ``clip``, ``t5``, ``unet`` or ``transformer``.

    ``None`` if no known model has such a layer. Original U-Net names come back in ``diffusers``' spelling.
    """
    numbers = _NUMBER.findall(flat)
    known = None if "#" in flat else _templates().get(_NUMBER.sub("#", flat))
    if known is None or any(map(_PADDED.fullmatch, numbers)):
        return None
    kind, template = known
    left = iter(numbers)
    path = re.sub("#", lambda _: next(left), template)
    if kind == "unet" and is_ldm(path):
        published = from_ldm(path)
        return None if published is None else (kind, published)
    return kind, path


@cache
def _templates() -> dict[str, tuple[str, str]]:
    templates: dict[str, tuple[str, str]] = {}
    for kind, path in _known_paths():
        template = _NUMBER.sub("#", path)
        flat = flatten(template)
        if templates.setdefault(flat, (kind, template)) != (kind, template):
            raise AssertionError(f"{flat} flattens both {templates[flat]} and {(kind, template)}")
    return templates


def _known_paths() -> Iterator[tuple[str, str]]:
    for family in FAMILIES.values():
        for row in family.parts.values():
            kind = {ClipEncoder: "clip", T5Encoder: "t5", UNet: "unet", Transformer: "transformer"}[type(row)]
            modules = dict.fromkeys(name.rpartition(".")[0] for name in row.weights())
            for module in filter(None, modules):
                yield kind, module
                if module.startswith("text_model."):  # what transformers calls it since 5.6
                    yield kind, module.removeprefix("text_model.")
                original = to_ldm(module, family.name) if kind == "unet" else None
                if original is not None:
                    yield kind, original
            for original in row.originals if isinstance(row, Transformer) else ():
                yield kind, original
