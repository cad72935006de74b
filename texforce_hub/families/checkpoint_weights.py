"""The weights of a one-file checkpoint under our names, in the shapes that its own header gives. Torch-free."""

from collections.abc import Iterator, Mapping

from texforce_hub.families.names import publish
from texforce_hub.families.original_clip import from_open_clip
from texforce_hub.families.original_unet import from_ldm, is_ldm
from texforce_hub.files.header import Header

Shape = tuple[int, ...]

_NETWORK = "model.diffusion_model."
_BLOCKS = ("double_blocks.", "single_blocks.", "joint_blocks.")
_SD2 = "cond_stage_model.model."
_TOWERS: Mapping[
    str, str
] = {  # where an encoder lies in the file → our part; those that end in ".model." are OpenCLIP's
    "cond_stage_model.transformer.": "text_encoder",
    _SD2: "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder_2",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}
_SD2_UNREAD = ("text_model.encoder.layers.23.", "text_projection.")


def checkpoint_weights(header: Header) -> dict[str, Shape]:
    """``<part>.<name>`` → shape of every text encoder's, U-Net's or transformer's weight that a pipeline reads.

    A transformer's keep their original names.
    """
    return dict(found for key, info in header.tensors.items() for found in _translate(key, info.shape))


def _translate(key: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    for prefix, part in _TOWERS.items():
        if key.startswith(prefix):
            yield from _tower(key.removeprefix(prefix), shape, part, prefix)
            return
    path = key.removeprefix(_NETWORK)
    if is_ldm(path):
        module, _, parameter = path.rpartition(".")
        ours = from_ldm(module)
        if ours is not None:
            yield f"unet.{ours}.{parameter}", shape
    elif key.startswith(_NETWORK) or key.startswith(_BLOCKS):
        yield f"transformer.{path}", shape


def _tower(name: str, shape: Shape, part: str, prefix: str) -> Iterator[tuple[str, Shape]]:
    """One parameter of a text encoder; SD2's last block and its projection are in the file and in no pipeline."""
    for ours, its_shape in from_open_clip(name, shape) if prefix.endswith(".model.") else [(name, shape)]:
        published = None if prefix == _SD2 and ours.startswith(_SD2_UNREAD) else publish(part, ours)
        if published is not None:
            yield published, its_shape
