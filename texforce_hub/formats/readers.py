"""What other programs read: the layers for which they have a slot, and the DoRA that they compute as we do. Torch-free.

Read in their own code, and held against their key maps in ``tests/keys/readers.toml``: A1111 1.10.1, ComfyUI, Forge,
``diffusers`` and PEFT. A layer without a slot is left out by them, mostly without a word.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from texforce_hub.errors import ConfigError
from texforce_hub.families.names import part_of, path_of
from texforce_hub.families.original_transformer import is_original
from texforce_hub.formats.dialects.suffixes import is_norm

Slot = Callable[[str, str, str], bool]
"""Of a layer, a family and a layout: whether the program finds the layer in a file of that layout."""

_BLOCK = r"text_model\.encoder\.layers\.\d+\."
_LINEAR = re.compile(rf"{_BLOCK}(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
_XLABS = re.compile(r"single_blocks\.\d+\.qkv")  # rows of a layer, under a name that only its trainer has
_BLOCK_NORM = re.compile(rf"{_BLOCK}layer_norm[12]")
_ORIGINAL_UNETS = ("sdxl", "sdxl-refiner")  # kohya's layout has their layers in the original names


@dataclass(frozen=True, slots=True)
class Reader:
    """A program that reads adapters.

    ``layouts`` are those that are written for it, the usual one first; ``families`` those that it loads adapters of;
    ``axis`` is the axis of a DoRA layer's norms for which it is exact; ``whole_attention``: OpenCLIP's queries, keys,
    values and output of a block count only together; ``paired_norms``: a norm's scale and shift likewise.
    """

    name: str
    title: str
    layouts: tuple[str, ...]
    families: frozenset[str]
    has_slot: Slot
    axis: Literal["out", "in"]
    whole_attention: bool = False
    paired_norms: bool = False


def find_reader(name: str) -> Reader:
    """The program of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in READERS:
        raise ConfigError(f"no reader {name!r}; known: {', '.join(READERS)}")
    return READERS[name]


def has_open_clip(part: str, family: str) -> bool:
    """Whether the program's own code keeps this text encoder as OpenCLIP does, attention in one matrix."""
    return (part, family) == ("text_encoder", "sd2") or part == "text_encoder_2"


def _module(layer: str) -> tuple[str, str]:
    """``(module, parameter)`` of a layer's path; no parameter where it is the module's weight."""
    path = path_of(layer)
    for parameter in ("weight", "bias"):
        if path.endswith(f".{parameter}"):
            return path.removesuffix(f".{parameter}"), parameter
    return path, ""


def _in_a1111(layer: str, family: str, layout: str) -> bool:
    """Its modules, by names of its own for SD1 and SD2; biases only of norms."""
    del layout
    part, (module, parameter) = part_of(layer), _module(layer)
    if parameter == "bias" and not is_norm(module):
        return False
    if part == "unet":
        return family in _ORIGINAL_UNETS or not module.startswith(("conv_norm_out", "add_embedding"))
    norm = _BLOCK_NORM.fullmatch(module) is not None and not has_open_clip(part, family)
    return part.startswith("text_encoder") and (_LINEAR.fullmatch(module) is not None or norm)


def _in_comfyui(layer: str, family: str, layout: str) -> bool:
    """All of a U-Net; of CLIP the linear layers of its blocks, of T5 all in them; in its own layout every weight."""
    part, (module, parameter) = part_of(layer), _module(layer)
    if layout == "comfy":
        return part != "transformer" or is_original(module)
    if layout == "diffusers":
        return part == "transformer" or _LINEAR.fullmatch(module) is not None
    if part == "text_encoder_2" and module == "text_projection":
        return family in ("sdxl", "sd3")
    return _in_forge(layer, family, layout) and (parameter != "bias" or not module.startswith("encoder.block."))


def _in_forge(layer: str, family: str, layout: str) -> bool:
    del family, layout
    part, (module, _) = part_of(layer), _module(layer)
    if part == "transformer":
        return _XLABS.fullmatch(module) is None
    return not part.startswith("text_encoder") or _in_text_blocks(module)


def _in_text_blocks(module: str) -> bool:
    return _LINEAR.fullmatch(module) is not None or module.startswith("encoder.block.")


def _in_diffusers(layer: str, family: str, layout: str) -> bool:
    """``load_lora_weights`` drops T5's layers, and knows the linear ones of CLIP's blocks."""
    del family, layout
    return not part_of(layer).startswith("text_encoder") or _LINEAR.fullmatch(path_of(layer)) is not None


def _in_peft(layer: str, family: str, layout: str) -> bool:
    """Everything but embeddings, whose halves it stores turned."""
    del family, layout
    return ".embeddings." not in layer and path_of(layer) != "shared"


_UNETS = frozenset({"sd1", "sd2", "sdxl", "shapes"})
_READERS = (
    Reader("a1111", "A1111", ("kohya",), _UNETS, _in_a1111, "in", whole_attention=True, paired_norms=True),
    Reader(
        *("comfyui", "ComfyUI", ("kohya", "comfy", "diffusers"), _UNETS | {"sdxl-refiner", "sd3", "flux", "pixart"}),
        *(_in_comfyui, "in"),
        paired_norms=True,
    ),
    Reader("forge", "Forge", ("kohya",), _UNETS | {"flux"}, _in_forge, "in", paired_norms=True),
    Reader(
        *("diffusers", "diffusers", ("diffusers",), _UNETS | {"sdxl-refiner", "sd3", "flux"}),
        *(_in_diffusers, "out"),
    ),
    Reader(
        *("peft", "PEFT", ("peft",), _UNETS | {"sdxl-refiner", "sd3", "flux", "pixart"}),
        *(_in_peft, "out"),
    ),
)
READERS: Mapping[str, Reader] = MappingProxyType({reader.name: reader for reader in _READERS})
"""The programs for which ``convert --for`` writes."""
