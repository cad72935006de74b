"""A pipeline whose weights get no gradient, for as long as a run lasts."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from texforce_hub.errors import TrainingError
from texforce_hub.train.policies.lean import keeping_little


def move_frozen(module: nn.Module, device: torch.device | str) -> None:
    """Move what is not trained of a module; what is trained stays beside its optimiser's state."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.requires_grad:
            tensor.data = tensor.data.to(device)


@contextmanager
def frozen(pipeline: Any, *, checkpointing: bool = False, tiling: bool = False, lean: bool = True) -> Iterator[None]:
    """No gradient for the pipeline's weights and no dropout; afterwards all as before, every part where it was.

    SDXL's VAE, which overflows in float16, is float32 meanwhile, as in the pipeline's own call.

    ``checkpointing`` recomputes the network's activations in the backward pass instead of keeping them; with
    ``tiling`` the VAE decodes pictures one at a time, large ones in tiles; ``lean`` lets the graph keep what it needs.

    Raises:
        TrainingError: ``checkpointing`` with a network that has dropout: its training mode would change pictures.
    """
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    wanted = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    before = [(module, module.training, next(module.parameters()).device) for module in modules]
    try:
        for module in modules:
            module.requires_grad_(requires_grad=False).eval()
        opened = _checkpointed(pipeline) if checkpointing else nullcontext()
        little = keeping_little(_network(pipeline), pipeline.vae) if lean else nullcontext()
        with opened, little, _tiled(pipeline.vae, tiling), _upcast(pipeline):
            yield
    finally:
        for module, training, device in before:
            move_frozen(module.train(training), device)
        for parameter, trained in wanted:
            parameter.requires_grad_(trained)


def _network(pipeline: Any) -> Any:
    return getattr(pipeline, "unet", None) or pipeline.transformer


@contextmanager
def _checkpointed(pipeline: Any) -> Iterator[None]:
    network = _network(pipeline)
    was = getattr(network, "is_gradient_checkpointing", False)
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules()):
        raise TrainingError("the network has dropout, which gradient checkpointing would switch on; leave it out")
    try:
        network.enable_gradient_checkpointing()
        network.train()
        yield
    finally:
        if not was:
            network.disable_gradient_checkpointing()


@contextmanager
def _tiled(vae: Any, wanted: bool) -> Iterator[None]:  # noqa: FBT001
    names = [name for name in ("slicing", "tiling") if wanted and not getattr(vae, f"use_{name}", False)]
    try:
        for name in names:
            getattr(vae, f"enable_{name}")()
        yield
    finally:
        for name in names:
            getattr(vae, f"disable_{name}")()


@contextmanager
def _upcast(pipeline: Any) -> Iterator[None]:
    vae = pipeline.vae
    overflows = hasattr(pipeline, "upcast_vae") and vae.dtype == torch.float16 and vae.config.force_upcast
    try:
        if overflows:
            vae.float()
        yield
    finally:
        if overflows:
            vae.half()
