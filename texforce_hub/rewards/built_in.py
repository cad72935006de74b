"""The built-in rewards by name, so that they can be listed without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BuiltIn:
    """A row of the table of built-in rewards."""

    summary: str
    differentiable: bool
    downloads: str | None = None  # the weights it needs, a Hub id


BUILT_IN: dict[str, BuiltIn] = {
    "alignment": BuiltIn("does a picture of the shapes world show what its prompt says, 0 to 1", differentiable=True),
    "brightness": BuiltIn("mean of all pixels, 0 to 1", differentiable=True),
    "jpeg": BuiltIn("compressibility: minus the size as JPEG of quality 95, in kB", differentiable=False),
}
