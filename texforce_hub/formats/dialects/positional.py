"""cloneofsimo's files. Layers have no names, only their place in the walk through the model that was trained.

In safetensors ``text_encoder:0:up``; in ``.pt`` a bare list, up and down in turn, whose tensors are called by their
place here (``0``, ``1`` …) and which does not even say which model it is for. The walk visited the linear layers
inside each ``CLIPAttention`` (keys, values, queries, output), or inside each ``CrossAttention`` and ``GEGLU``. Names
are given only where count and every shape agree with one family's model.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from texforce_hub.errors import DialectError
from texforce_hub.families import FAMILIES, Family
from texforce_hub.families.names import part_of
from texforce_hub.formats.dialects.layout import Dialect, Reading, Shapes

_NAME = re.compile(r"(?P<stem>(?P<part>text_encoder|unet):(?P<index>0|[1-9]\d{0,5})):(?P<role>up|down)")
_LISTED = re.compile(r"0|[1-9]\d{0,5}")
_LIST = "list"  # the part of a list's layers, until their shapes tell it
_TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def read_name(key: str) -> Reading | None:
    """A provisional name, ``text_encoder.#0``, to be settled when all shapes are known."""
    if _LISTED.fullmatch(key):
        index, is_down = divmod(int(key), 2)
        return Reading(f"{_LIST}.#{index}", "down" if is_down else "up", f"{_LIST}:{index}")
    match = _NAME.fullmatch(key)
    return None if match is None else Reading(f"{match['part']}.#{match['index']}", match["role"], match["stem"])


def settle(shapes: Shapes) -> Mapping[str, str]:
    """Provisional name → layer name.

    Raises:
        DialectError: the counts or shapes are those of no known model.
    """
    settled: dict[str, str] = {}
    for part in dict.fromkeys(part_of(name) for name in shapes):
        mine = {name: roles for name, roles in shapes.items() if name.startswith(f"{part}.")}
        order = next((walk for walk in _walks(part) if _fits(walk, mine, part)), None)
        if order is None:
            whose = "a list" if part == _LIST else f"the {part}"
            raise DialectError(
                f"cloneofsimo: {len(mine)} unnamed layers of {whose} fit no known model in number and shapes, and a "
                "layer's place alone does not name it; convert the file with the trainer that wrote it"
            )
        settled |= {f"{part}.#{index}": name for index, (name, _) in enumerate(order)}
    return settled


Walk = Sequence[tuple[str, tuple[int, ...]]]


def _fits(walk: Walk, layers: Shapes, part: str) -> bool:
    if len(walk) != len(layers):
        return False
    for index, (_, shape) in enumerate(walk):
        roles = layers.get(f"{part}.#{index}", {})
        if (roles.get("up", ())[:1], roles.get("down", (0, 0))[1:2]) != (shape[:1], shape[1:2]):
            return False
    return True


def _walks(part: str) -> Iterator[Walk]:
    for family in FAMILIES.values():
        if part in ("text_encoder", _LIST) and "text_encoder" in family.parts:
            yield [(n, s) for n, s in _modules(family, "text_encoder") if n.endswith(_TEXT)]
        if part in ("unet", _LIST) and "unet" in family.parts:
            yield from _unet_walks(family)


def _modules(family: Family, part: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in family.weights.items():
        if name.startswith(f"{part}.") and name.endswith(".weight"):
            yield name.removesuffix(".weight"), shape


def _unet_walks(family: Family) -> Iterator[Walk]:
    """Old libraries registered the middle block after the way up, and the feed-forward before ``attn2``."""
    modules = dict(_modules(family, "unet"))
    blocks = list(dict.fromkeys(name.partition(".attn1.")[0] for name in modules if ".attn1." in name))
    middle = [block for block in blocks if ".mid_block." in block]
    outer = [block for block in blocks if block not in middle]
    down = [block for block in outer if ".down_blocks." in block]
    up = [block for block in outer if block not in down]
    inner = ("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"), ("attn1", "attn2")
    for order, parts in product(([*down, *up, *middle], [*down, *middle, *up]), inner):
        names = [name for block in order for name in _block(block, parts)]
        yield [(name, modules[name]) for name in names]


def _block(block: str, parts: Sequence[str]) -> Iterator[str]:
    for part in parts:
        if part == "ff":
            yield f"{block}.ff.net.0.proj"
        else:
            yield from (f"{block}.{part}.{projection}" for projection in _ATTENTION)


POSITIONAL = Dialect("cloneofsimo", "cloneofsimo, layers by position", read_name, settle=settle)
