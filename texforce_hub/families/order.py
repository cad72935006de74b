"""The order in which people read layers: ``layers.2`` before ``layers.10``, ``text_encoder`` before its second."""

import re
from functools import lru_cache

from texforce_hub.families.names import PARTS

_BLOCK = re.compile(r"mid_block|.*?(?:blocks|layers|block)\.\d+|[^.]+")
_DIGITS = re.compile(r"(\d+)")
_BLOCKS = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks", "conv_norm_out")
"""A U-Net from its input to its output; its last layer, and everything else, comes after."""


def block_of(name: str) -> str:
    """The block that a layer lies in, with its part: ``unet.down_blocks.1`` of ``unet.down_blocks.1.attentions.0…``."""
    part, _, path = name.partition(".")
    match = _BLOCK.match(path)
    return f"{part}.{match[0] if match else path}"


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A key to sort names of layers by: parts and blocks as in the pipeline, numbers by their value."""
    return tuple(_rank_word(word) for word in name.split("."))


@lru_cache(maxsize=4096)
def _rank_word(word: str) -> tuple[int, int, str]:
    if word.isascii() and word.isdigit():
        return 0, int(word[:18]), word
    known = (*PARTS, *_BLOCKS)
    pieces = "".join(piece.zfill(18) if piece.isdigit() else piece for piece in _DIGITS.split(word))
    return (1, known.index(word), "") if word in known else (2, 0, pieces)
