"""How many pictures fit: what a U-Net call keeps for its backward pass, against what is free."""

import os
from typing import Any

import torch
from torch import Tensor

from texforce_hub.train.policies.frozen import frozen
from texforce_hub.train.policies.policy import Policy

_MOST = 64
_OF_FREE = 0.7  # the rest is for what the pass itself needs


def fit_batch(policy: Policy) -> int:
    """Pictures in one U-Net call that memory holds, 1 to 64."""
    with frozen(policy.pipeline, checkpointing=policy.config.checkpointing):
        return max(1, min(_MOST, int(_OF_FREE * _free_bytes(policy.device) / saved_bytes(policy))))


def saved_bytes(policy: Policy) -> int:
    """Bytes that the graph of one picture's call of the network, frozen by now, keeps; its weights are not counted."""
    network = policy.network
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad():
        rows, _ = policy.leaves(policy.rows([""], 1))
        latents = policy.draw_noise(1, torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = policy.predict(latents, policy.make_steps(2).timesteps[0], rows)
        del output
    return max(1, sum(seen.values()))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**33
