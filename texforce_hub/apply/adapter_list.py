"""A model's list of adapters, as PEFT and the pipelines' own calls read it, and which of them are active."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig
from torch import nn

from texforce_hub.apply.attach import Attachment
from texforce_hub.apply.model import tuner_layers
from texforce_hub.apply.wrappers import NAME


def free_name(roots: Sequence[nn.Module]) -> str:
    """An adapter name that none of these models uses: ``texforce``, ``texforce_2`` …"""
    taken = {name for root in roots for name in getattr(root, "peft_config", {})}
    number = 1
    while (name := NAME if number == 1 else f"{NAME}_{number}") in taken:
        number += 1
    return name


def register(root: Any, name: str, attachments: Mapping[str, Attachment]) -> None:
    """Enter an attached stack in the model's list of adapters, and make it active beside the others.

    Args:
        attachments: by the path of the layer in the model.
    """
    ranks = {path: attachment.wrapper.r[name] for path, attachment in attachments.items()}
    widest = max(ranks.values())
    config = LoraConfig(
        r=widest,
        lora_alpha=widest,
        target_modules=sorted(ranks),
        rank_pattern=ranks,
        alpha_pattern={path: attachment.alpha for path, attachment in attachments.items()},
        inference_mode=True,
    )
    if getattr(root, "peft_config", None):
        root.peft_config[name] = config  # in place: a PeftModel around the encoder shares this dictionary
    else:
        root.peft_config = {name: config}
    root._hf_peft_config_loaded = True
    layers = list(tuner_layers(root))
    others: list[str] = next((layer.active_adapters for layer in layers if layer.active_adapters != [name]), [])
    for layer in layers:  # the library asks a single layer for the model's active adapters: all must agree
        active = others if layer.active_adapters == [name] else layer.active_adapters
        layer._active_adapter = [*(other for other in active if other != name), name]


def note_alphas(root: Any, name: str, alphas: Mapping[str, float]) -> None:
    """Bring the model's list of adapters up to date after new weights; ``alphas`` are by the path of the layer."""
    config = (getattr(root, "peft_config", None) or {}).get(name)
    if config is not None:
        config.alpha_pattern = alphas


def unregister(root: Any, name: str) -> None:
    """Strike a stack from the model's list; the other adapters keep their state. Repeated, it does nothing more."""
    for layer in tuner_layers(root):
        if name in layer.active_adapters:
            layer._active_adapter = [other for other in layer.active_adapters if other != name]
    configs: dict[str, Any] = getattr(root, "peft_config", None) or {}
    configs.pop(name, None)
    if hasattr(root, "peft_config") and not configs:
        del root.peft_config
        root._hf_peft_config_loaded = None


def activate(root: nn.Module, name: str, *, active: bool) -> None:
    """Switch one attached stack on or off, leaving every other adapter as it is."""
    for layer in tuner_layers(root):
        others = [other for other in layer.active_adapters if other != name]
        layer._active_adapter = [*others, name] if active else others
