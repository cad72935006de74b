"""Stand-ins for packages that a trainer's modules import and that naming its layers never calls."""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock

_OPTIONAL = ("torchvision", "cv2", "imagesize", "voluptuous", "einops", "toml", "bitsandbytes", "gguf", "fire")


class _StandIn(MetaPathFinder, Loader):
    """The last finder asked: what is installed is found before it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in _OPTIONAL else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return MagicMock(__path__=[], __version__="0", __spec__=spec)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def stand_in_for_missing() -> None:
    """Let a trainer import its optional packages; the libraries that look for them look before."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401

    sys.meta_path.append(_StandIn())
