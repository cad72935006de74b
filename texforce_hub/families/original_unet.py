"""The U-Net's names in the original latent-diffusion code, and in ``diffusers``: two walks of one network.

Every SD-family U-Net has two resnets a block on the way down and three on the way up, so the counters of the
original code are block and layer in one number.
"""

import re

from texforce_hub.families import FAMILIES
from texforce_hub.families.unet import UNet

_AROUND = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_N = "(0|[1-9][0-9]?)"  # a block's number: no leading zeros, no other script's digits
_LAST = {"down": 1, "up": 2}  # a block's last resnet
_ORIGINAL = re.compile(rf"(input_blocks|output_blocks)\.{_N}\.{_N}\.(.+)")
_DIFFUSERS = re.compile(rf"(down|up)_blocks\.{_N}\.(resnets|attentions|downsamplers|upsamplers)\.{_N}\.(.+)")


def is_ldm(path: str) -> bool:
    """Whether a path inside the U-Net is spelled as in the original code."""
    return path.startswith(("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out."))


def from_ldm(path: str) -> str | None:
    """The ``diffusers`` name of an original one; ``None`` if there is no such layer."""
    for original, ours in _AROUND.items():
        if path == original or path.startswith(f"{original}."):
            rest = path[len(original) + 1 :]
            return ".".join(filter(None, (ours, _RESNET.get(rest, rest))))
    match = _ORIGINAL.fullmatch(path)
    if match is None:
        return None
    way, number, sub, rest = match[1], int(match[2]), int(match[3]), match[4]
    return _from_input(number, sub, rest) if way == "input_blocks" else _from_output(number, sub, rest)


def _from_input(number: int, sub: int, rest: str) -> str | None:
    block, layer = divmod(number - 1, 3)
    if layer == 2:
        return f"down_blocks.{block}.downsamplers.0.conv" if (sub, rest) == (0, "op") else None
    return _layer(f"down_blocks.{block}", layer, sub, rest)


def _from_output(number: int, sub: int, rest: str) -> str | None:
    block, layer = divmod(number, 3)
    if rest == "conv":
        return f"up_blocks.{block}.upsamplers.0.conv" if layer == 2 and sub in (1, 2) else None
    return _layer(f"up_blocks.{block}", layer, sub, rest)


def _layer(block: str, layer: int, sub: int, rest: str) -> str | None:
    if sub == 0:
        return f"{block}.resnets.{layer}.{_RESNET[rest]}" if rest in _RESNET else None
    return f"{block}.attentions.{layer}.{rest}" if sub == 1 else None


def to_ldm(path: str, family: str | None = None) -> str | None:
    """The original name of a ``diffusers`` one, in this family's U-Net (SDXL's if none is given).

    ``None`` if the original code has no such layer.
    """
    for original, ours in _AROUND.items():
        if path == ours or path.startswith(f"{ours}."):
            return ".".join(filter(None, (original, _to_resnet(path[len(ours) + 1 :]))))
    match = _DIFFUSERS.fullmatch(path)
    if match is None:
        return None
    way, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if layer > _LAST[way] or (layer and kind.endswith("samplers")):
        return None
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.{2 if _attends(block, family) else 1}.conv"
    head = f"input_blocks.{3 * block + layer + 1}" if way == "down" else f"output_blocks.{3 * block + layer}"
    return f"{head}.0.{_to_resnet(rest)}" if kind == "resnets" else f"{head}.1.{rest}"


def _to_resnet(rest: str) -> str:
    return next((original for original, ours in _RESNET.items() if ours == rest), rest)


def _attends(block: int, family: str | None) -> bool:
    """Whether an up block has attentions: its upsampler comes after them in the original's list."""
    row = FAMILIES[family or "sdxl"].parts.get("unet")
    if not isinstance(row, UNet):
        return True
    depths = row.transformers[::-1]
    return block < len(depths) and depths[block] > 0
