"""Pipeline parts and the published spelling of the modules inside them."""

import re

from texforce_hub.families.original_unet import from_ldm, is_ldm

PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer")
"""The parts an adapter can change, the longer names first."""

WRAPPERS = ("base_model.model.", "module.")
"""What libraries that wrap a model put before the names of its modules."""

_PADDED = re.compile(r"(^|\.)0[0-9]")  # layers.03 is no layer's name; layers.3 is
_OWN_MODULES = {
    "text_encoder": ("text_model.", "encoder.layers.", "text_projection"),
    "text_encoder_3": ("encoder.block.", "shared"),
    "unet": (
        *("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.", "add_embedding."),
        *("input_blocks.", "middle_block.", "output_blocks."),
    ),
    "transformer": (
        *("transformer_blocks.", "single_transformer_blocks.", "double_blocks.", "single_blocks.", "joint_blocks."),
        *("context_embedder", "x_embedder", "norm_out.", "time_text_embed.", "proj_out", "pos_embed."),
        *("img_in", "txt_in", "time_in.", "vector_in.", "guidance_in.", "final_layer.", "t_embedder.", "y_embedder."),
    ),
}


def part_of(name: str) -> str:
    """The part that a layer of this name changes: ``unet`` of ``unet.conv_in``."""
    return name.partition(".")[0]


def path_of(name: str) -> str:
    """A layer's name inside its part: ``conv_in`` of ``unet.conv_in``."""
    return name.partition(".")[2]


def split_part(path: str) -> tuple[str, str] | None:
    """``(part, path inside it)`` where the name says its part; ``None`` where it does not."""
    part, dot, rest = path.partition(".")
    return (part, rest) if dot and part in PARTS else None


def infer_part(path: str) -> str | None:
    """The part whose modules are named so; a CLIP text encoder counts as the first one."""
    for part, beginnings in _OWN_MODULES.items():
        if path.startswith(beginnings):
            return part
    return None


def unwrap(path: str) -> tuple[str | None, str]:
    """``(part or None, module's name)`` of a tensor's stem, as the model that was trained calls the module."""
    part, path = split_part(path) or (None, path)
    for wrapper in WRAPPERS:
        path = path.removeprefix(wrapper)
    return part, path


def publish(part: str, path: str) -> str | None:
    """Our name of a module: part and path in the published spelling; ``None`` if no model has such a layer."""
    if path.startswith(".") or path.endswith(".") or ".." in path or _PADDED.search(path):
        return None
    if part == "unet" and is_ldm(path):
        published = from_ldm(path)
        return None if published is None else f"unet.{published}"
    if path.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")):
        path = f"text_model.{path}"
    return f"{part}.{path}"
