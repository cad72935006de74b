"""What a pipeline computes, its bits, and the dense sum that a stack must equal."""

import functools
from typing import Any

import torch

from tests.support.pipelines_tiny import text_parts, tiny_pipeline
from texforce_hub.families import live_name


@functools.cache
def shared_pipeline(family):
    return tiny_pipeline(family)


def bits(pipe):
    parts = [*text_parts(pipe), *(p for p in ("unet", "transformer") if getattr(pipe, p, None) is not None)]
    return {f"{p}.{n}": t.detach().clone() for p in parts for n, t in getattr(pipe, p).state_dict().items()}


def same_bits(pipe, before):
    after = bits(pipe)
    return after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


def hidden(module):
    with torch.no_grad():
        return module(torch.arange(16).unsqueeze(0) * 3 % 52).last_hidden_state


def text_outputs(pipe):
    ids = torch.arange(16).unsqueeze(0) * 3 % 52
    with torch.no_grad():
        return [getattr(pipe, part)(ids)[0] for part in text_parts(pipe)]


def live_weight(pipe, name):
    part, _, path = name.partition(".")
    module = getattr(pipe, part)
    return module.get_submodule(live_name(path, hasattr(module, "text_model"))).weight


def gold_outputs(pipe, stack):
    """Outputs with the dense sum written by hand, then taken off."""
    saved: dict[str, Any] = {}
    with torch.no_grad():
        for adapter, weight in stack:
            for name, layer in adapter.layers.items():
                tensor = live_weight(pipe, name)
                saved.setdefault(name, (tensor, tensor.clone()))
                tensor += weight * layer.delta(saved[name][1])
    found = text_outputs(pipe)
    with torch.no_grad():
        for tensor, copy in saved.values():
            tensor.copy_(copy)
    return found


def gold_outputs_of(before, pipe, stack):
    fresh = tiny_pipeline("sd1")
    fresh.text_encoder.load_state_dict({n[13:]: t for n, t in before.items() if n.startswith("text_encoder.")})
    return gold_outputs(fresh, stack)[0]
