"""What the authors' own code of Flux and SD3 calls a transformer's layers, and which of ``diffusers``' layers they are.

The authors' code keeps queries, keys and values in one weight; ``diffusers`` has a layer for each, a range of that
weight's rows. Where a norm's scale and shift come out of one layer, the two are the other way round in the last ones.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

from texforce_hub.errors import FamilyError
from texforce_hub.families.parameters import Shape

Ranges = tuple[tuple[int, int], ...]
"""Ranges of rows, first and one past the last, in the order in which they are taken."""


@dataclass(frozen=True, slots=True)
class Rows:
    """One of ``diffusers``' layers, and the rows of the original layer's weight that are its own."""

    path: str
    ranges: Ranges

    @property
    def count(self) -> int:
        """How many rows it has."""
        return sum(end - start for start, end in self.ranges)


@dataclass(frozen=True, slots=True)
class _Stream:
    """What a block's layers for one stream, image or text, are called in ``diffusers``."""

    heads: tuple[str, str, str]
    out: str
    feed_forward: str
    norm: str


_Targets = tuple[tuple[str, int], ...]
"""``diffusers``' layers in the order of their rows, and how many rows each has for one column; 0: any number."""

_IMAGE = _Stream(("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1")
_TEXT = _Stream(("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context")
_BLOCK = "transformer_blocks.#"
_BLOCKS = ("double_blocks.", "single_blocks.", "joint_blocks.")
_SINGLE = "single_transformer_blocks.#"
_NUMBER = re.compile(r"(?<=_blocks\.)[0-9]+(?=\.)")
_LAST_NORM = "final_layer.adaLN_modulation.1"
_CONTEXT_NORM = "joint_blocks.#.context_block.adaLN_modulation.1"


def _whole(name: str, times: int = 0) -> _Targets:
    return ((name, times),)


def _heads(attention: str, stream: _Stream) -> _Targets:
    return tuple((f"{attention}.{name}", 1) for name in stream.heads)


def _flux_stream(name: str, stream: _Stream) -> dict[str, _Targets]:
    block = f"double_blocks.#.{name}"
    return {
        f"{block}_attn.qkv": _heads(f"{_BLOCK}.attn", stream),
        f"{block}_attn.proj": _whole(f"{_BLOCK}.attn.{stream.out}", 1),
        f"{block}_mlp.0": _whole(f"{_BLOCK}.{stream.feed_forward}.net.0.proj", 4),
        f"{block}_mlp.2": _whole(f"{_BLOCK}.{stream.feed_forward}.net.2"),
        f"{block}_mod.lin": _whole(f"{_BLOCK}.{stream.norm}.linear", 6),
    }


def _sd3_stream(name: str, stream: _Stream) -> dict[str, _Targets]:
    block = f"joint_blocks.#.{name}_block"
    return {
        f"{block}.attn.qkv": _heads(f"{_BLOCK}.attn", stream),
        f"{block}.attn.proj": _whole(f"{_BLOCK}.attn.{stream.out}", 1),
        f"{block}.mlp.fc1": _whole(f"{_BLOCK}.{stream.feed_forward}.net.0.proj", 4),
        f"{block}.mlp.fc2": _whole(f"{_BLOCK}.{stream.feed_forward}.net.2"),
        f"{block}.adaLN_modulation.1": _whole(f"{_BLOCK}.{stream.norm}.linear"),
    }


def _embedder(original: str, ends: tuple[str, str], name: str) -> dict[str, _Targets]:
    ours = f"time_text_embed.{name}_embedder.linear"
    return {f"{original}.{end}": _whole(f"{ours}_{index}") for index, end in enumerate(ends, 1)}


_LAST = {"final_layer.linear": _whole("proj_out"), _LAST_NORM: _whole("norm_out.linear")}
_ENDS = ("in_layer", "out_layer")

FLUX: Mapping[str, _Targets] = {
    **_flux_stream("img", _IMAGE),
    **_flux_stream("txt", _TEXT),
    "single_blocks.#.linear1": (*_heads(f"{_SINGLE}.attn", _IMAGE), (f"{_SINGLE}.proj_mlp", 4)),
    "single_blocks.#.linear2": _whole(f"{_SINGLE}.proj_out"),
    "single_blocks.#.modulation.lin": _whole(f"{_SINGLE}.norm.linear", 3),
    **_embedder("time_in", _ENDS, "timestep"),
    **_embedder("vector_in", _ENDS, "text"),
    **_embedder("guidance_in", _ENDS, "guidance"),
    "img_in": _whole("x_embedder"),
    "txt_in": _whole("context_embedder"),
    **_LAST,
}
"""Flux's layers by their original names, the blocks' numbers written ``#``."""

SD3: Mapping[str, _Targets] = {
    **_sd3_stream("x", _IMAGE),
    **_sd3_stream("context", _TEXT),
    "joint_blocks.#.x_block.attn2.qkv": _heads(f"{_BLOCK}.attn2", _IMAGE),
    "joint_blocks.#.x_block.attn2.proj": _whole(f"{_BLOCK}.attn2.to_out.0"),
    **_embedder("t_embedder.mlp", ("0", "2"), "timestep"),
    **_embedder("y_embedder.mlp", ("0", "2"), "text"),
    "x_embedder.proj": _whole("pos_embed.proj"),
    **_LAST,
}
"""SD3's and SD3.5's layers by their original names, the blocks' numbers written ``#``."""

XLABS: Mapping[str, _Targets] = {"single_blocks.#.qkv": _heads(f"{_SINGLE}.attn", _IMAGE)}
"""What XLabs' trainer changes of Flux that is no layer there: the first rows of ``linear1``, without the MLP's."""

_ALL = {**FLUX, **SD3, **XLABS}


def templates(targets: Mapping[str, _Targets]) -> tuple[str, ...]:
    """The original names with all numbers written ``#``, as flattened names are looked up."""
    return tuple(dict.fromkeys(re.sub(r"(?<=\.)[0-9]+$", "#", name) for name in targets))


def is_original(path: str) -> bool:
    """Whether a module inside a transformer is named as the authors' code does; ``diffusers``' names are others."""
    return _NUMBER.sub("#", path, count=1) in _ALL or path.startswith(_BLOCKS)


def find_rows(path: str, shape: Shape) -> tuple[Rows, ...]:
    """Where ``diffusers`` has the rows of a layer that is named as the authors' code does; empty for other names.

    ``path`` is that of a module inside the transformer and ``shape`` its weight's, or of a bias, ``….qkv.bias``.

    Raises:
        FamilyError: its rows make no such layers, it cannot be told which rows go where, or it is in a block of the
            authors' own code and ``diffusers`` is not known to have it.
    """
    module, dot, parameter = path.rpartition(".") if len(shape) == 1 else (path, "", "")
    number = _NUMBER.search(module)
    template = _NUMBER.sub("#", module, count=1)
    targets = _ALL.get(template, ())
    if not targets and path.startswith(_BLOCKS):
        raise FamilyError(f"{path} is named as in the authors' own code, and diffusers is not known to have it")
    if not targets:
        return ()
    index = "" if number is None else number[0]
    names = [target.replace("#", index) + dot + parameter for target, _ in targets]
    swapped = _is_swapped(template, path, shape)
    if not _divides(targets, shape, swapped=swapped):
        raise FamilyError(f"{path} changes a weight {shape}, whose rows do not divide into {', '.join(names)}")
    half = shape[0] // 2
    ranges = [((half, shape[0]), (0, half))] if swapped else _split(targets, shape[0])
    return tuple(Rows(name, found) for name, found in zip(names, ranges, strict=True))


def _divides(targets: _Targets, shape: Shape, *, swapped: bool) -> bool:
    """Whether a layer has as many rows as in Flux and SD3; other models have layers of the same names."""
    total = sum(times for _, times in targets)
    if swapped or len(shape) == 1:
        return shape[0] % (2 if swapped else total or 1) == 0
    return total == 0 or shape[0] == total * shape[1]


def _split(targets: _Targets, rows: int) -> list[Ranges]:
    if len(targets) == 1:
        return [((0, rows),)]
    unit = rows // sum(times for _, times in targets)
    return [(bounds,) for bounds in pairwise(accumulate((times * unit for _, times in targets), initial=0))]


def _is_swapped(template: str, path: str, shape: Shape) -> bool:
    """Whether shift comes before scale here and after it in ``diffusers``: in the last layer of a stream.

    SD3's text stream ends in its last block, whose norm has two vectors, not six.
    """
    if template != _CONTEXT_NORM:
        return template == _LAST_NORM
    if len(shape) == 1:
        raise FamilyError(f"{path}: whether this is the last block's, whose halves change places, is not in the file")
    return shape[0] == 2 * shape[1]
