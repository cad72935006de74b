"""The built-in rewards by name, so that they can be listed without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BuiltIn:
    """A row of the table of built-in rewards.

    downloads: the weights that it needs, a Hub id; package: what it needs in an environment of its own
    module, variant: where its factory is, and what it is told
    """

    summary: str
    differentiable: bool
    downloads: str | None = None
    package: str | None = None
    licence: str | None = None
    module: str | None = None
    variant: str | None = None

    @property
    def needs(self) -> str:
        """The weights, or the package in an environment of its own, that it needs; empty without any."""
        return self.downloads or self.package or ""


_APACHE, _MIT = "Apache-2.0", "MIT"

BUILT_IN: dict[str, BuiltIn] = {
    "alignment": BuiltIn("does a picture of the shapes world show what its prompt says, 0 to 1", differentiable=True),
    "brightness": BuiltIn("mean of all pixels, 0 to 1", differentiable=True),
    "jpeg": BuiltIn("compressibility: minus the size as JPEG of quality 95, in kB", differentiable=False),
    "pickscore": BuiltIn(
        "which picture people would pick, a cosine, .17 to .24",
        differentiable=True,
        downloads="yuvalkirstain/PickScore_v1",
        licence=_MIT,
    ),
    "hpsv2": BuiltIn(
        "which picture people prefer, a cosine, v2",
        differentiable=True,
        downloads="xswu/HPSv2",
        licence=_APACHE,
        variant="v2",
    ),
    "hpsv2.1": BuiltIn(
        "which picture people prefer, a cosine, v2.1",
        differentiable=True,
        downloads="xswu/HPSv2",
        licence=_APACHE,
        module="hpsv2",
        variant="v2.1",
    ),
    "imagereward": BuiltIn(
        "how people rank pictures of a prompt, mean 0",
        differentiable=True,
        downloads="zai-org/ImageReward",
        licence=_APACHE,
    ),
    "aesthetic": BuiltIn(
        "how much people like it, 1 to 10 (aesthetic:FILE)",
        differentiable=True,
        downloads="openai/clip-vit-large-patch14",
        licence=_APACHE,
    ),
    "clipscore": BuiltIn(
        "2.5 × CLIP's cosine, ViT-B/32, 0 to 1",
        differentiable=True,
        downloads="openai/clip-vit-base-patch32",
        licence=_MIT,
        variant="b32",
    ),
    "clipscore-l14": BuiltIn(
        "2.5 × CLIP's cosine, ViT-L/14, 0 to 1",
        differentiable=True,
        downloads="openai/clip-vit-large-patch14",
        licence=_MIT,
        module="clipscore",
        variant="l14",
    ),
    "env:hands": BuiltIn(
        "how whole the hands are: found, five fingers, sharp, 0 to 1",
        differentiable=False,
        package="mediapipe",
        licence=_APACHE,
    ),
    "env:faces": BuiltIn(
        "how whole the faces are: found, symmetric, sharp, 0 to 1",
        differentiable=False,
        package="mediapipe",
        licence=_APACHE,
    ),
}
