"""A CLIP text tower's names in OpenCLIP's code, where queries, keys and values lie in one matrix, and in ours."""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

OPEN_CLIP: Mapping[str, str] = MappingProxyType(
    {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
)
"""A block's modules, ours → OpenCLIP's."""

AROUND: Mapping[str, str] = MappingProxyType(
    {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
)
"""The parameters around the blocks, ours → OpenCLIP's, but for the projection, which is stored turned."""

_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
_OURS = {theirs: ours for ours, theirs in OPEN_CLIP.items()}


def from_open_clip(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Our names and shapes of what one OpenCLIP parameter holds; none for one that no pipeline reads."""
    ours = next((ours for ours, theirs in AROUND.items() if theirs == name), None)
    match = _BLOCK.fullmatch(name)
    if ours is not None:
        yield ours, shape
    elif name == "text_projection":
        yield "text_projection.weight", shape[::-1]
    elif match is not None and match[2] == "attn.in_proj" and shape:
        for which in "qkv":
            path = f"text_model.encoder.layers.{match[1]}.self_attn.{which}_proj.{match[3]}"
            yield path, (shape[0] // 3, *shape[1:])
    elif match is not None and match[2] in _OURS:
        yield f"text_model.encoder.layers.{match[1]}.{_OURS[match[2]]}.{match[3]}", shape
