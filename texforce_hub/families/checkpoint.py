"""Which family a whole model in one file is of: by tensors that only it has, then by its attention's width."""

from texforce_hub.files.header import Header

_TOWERS = (  # where the original code keeps text encoders, the more special first
    ("conditioner.embedders.1.model.", "sdxl"),
    ("conditioner.embedders.0.model.", "sdxl-refiner"),
    ("cond_stage_model.model.", "sd2"),
    ("cond_stage_model.transformer.", "sd1"),
)
_BLOCKS = (  # where there are none
    ("double_blocks.0.img_attn.norm.key_norm.scale", "flux"),
    ("joint_blocks.0.context_block.adaLN_modulation.1.bias", "sd3"),
)
_ATTENTION = "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
_WIDTHS = {768: "sd1", 1024: "sd2"}


def recognize_checkpoint(header: Header) -> str | None:
    """The family of a checkpoint in its original layout; ``None`` if it bears no family's mark."""
    for mark, name in _TOWERS:
        if any(key.startswith(mark) for key in header.tensors):
            return name
    for mark, name in _BLOCKS:
        if any(key.endswith(mark) for key in header.tensors):
            return name
    widths = {info.shape[-1] for key, info in header.tensors.items() if key.endswith(_ATTENTION) and info.shape}
    return _WIDTHS.get(min(widths, default=0))
