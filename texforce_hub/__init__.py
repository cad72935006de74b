"""LoRA adapters for the text encoders of Stable-Diffusion-style pipelines: read, apply, merge, train.

The names below are the whole promise; each is loaded on first use, so that importing the package (and
``texforce-hub --help``) costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES: dict[str, str] = {
    "Adapter": "adapter",
    "AdapterRef": "refs",
    "Applied": "apply",
    "apply_adapter": "apply",
    "check_adapter": "check",
    "compare_adapters": "compare",
    "convert_adapter": "convert",
    "Dense": "adapter",
    "encode_prompts": "conditioning",
    "extract_adapter": "extract",
    "inspect_file": "inspection",
    "load_pipeline": "pipelines",
    "LowRank": "adapter",
    "measure_fold": "merge.fold",
    "merge_adapters": "merge",
    "Merged": "merge",
    "read_adapter": "sources",
    "read_tags": "prompt_tags",
    "Recipe": "recipe",
    "repair_pipeline": "pipelines",
    "resize_adapter": "resize",
    "RewardRef": "refs",
    "save_checkpoint": "pipelines",
    "save_pipeline": "pipelines",
    "save_text_encoder": "pipelines",
    "Stack": "refs",
    "TexForceHubError": "errors",
    "Vector": "adapter",
    "verify_merge": "merge.replay",
    "write_adapter": "sources",
}

__all__ = sorted(_HOMES)  # the table above is the list


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
