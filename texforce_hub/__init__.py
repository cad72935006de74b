"""LoRA adapters for the text encoders of Stable-Diffusion-style pipelines: read, apply, merge, train.

The names below are the whole promise; each is loaded on first use, so that importing the package (and
``texforce-hub --help``) costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES: dict[str, str] = {
    "Adapter": "adapter.value",
    "AdapterRef": "hub.refs.adapter",
    "Applied": "apply.handle",
    "apply_adapter": "apply.applied",
    "check_adapter": "apply.fit",
    "compare_adapters": "merge.compare",
    "convert_adapter": "hub.convert",
    "Dense": "adapter.dense",
    "DrawSettings": "generate.draw",
    "encode_prompts": "generate.prompts.encode",
    "evaluate_variants": "evaluate.variants",
    "extract_adapter": "merge.extract",
    "fetch_adapter": "hub.pull",
    "FetchedAdapter": "hub.pull",
    "generate_images": "generate.draw",
    "inspect_file": "hub.inspect",
    "load_pipeline": "pipelines.load",
    "LowRank": "adapter.low_rank",
    "measure_fold": "apply.fold",
    "measure_words": "evaluate.words",
    "merge_adapters": "merge.merge",
    "Merged": "merge.merge",
    "per_sample_adapters": "apply.per_sample",
    "push_adapter": "hub.push",
    "PushedAdapter": "hub.push",
    "read_adapter": "hub.read",
    "read_tags": "generate.prompts.adapter_index",
    "Recipe": "recipe",
    "repair_pipeline": "pipelines.repair",
    "resize_adapter": "merge.resize",
    "RewardRef": "rewards.ref",
    "Sampling": "evaluate.evaluation",
    "save_checkpoint": "pipelines.save_checkpoint",
    "save_pipeline": "pipelines.save",
    "save_text_encoder": "pipelines.save_checkpoint",
    "search_adapters": "hub.search",
    "Stack": "hub.refs.stack",
    "TexForceHubError": "errors",
    "train_adapter": "train.run",
    "TrainConfig": "train.config",
    "tune_weights": "evaluate.tune",
    "use_lock": "hub.lock",
    "Variant": "evaluate.drawing",
    "Vector": "adapter.dense",
    "verify_merge": "merge.replay",
    "write_adapter": "hub.write",
}

__all__ = sorted(_HOMES)  # the table above is the list


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
