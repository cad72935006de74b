"""A pipeline whose weights get no gradient, for as long as a run lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from texforce_hub.errors import TrainingError


@contextmanager
def frozen(pipeline: Any, *, checkpointing: bool = False, tiling: bool = False) -> Iterator[None]:
    """No gradient for the pipeline's weights and no dropout; afterwards all as before, the VAE where it was.

    ``checkpointing`` recomputes the network's activations in the backward pass instead of keeping them; with
    ``tiling`` the VAE decodes large pictures in tiles.

    Raises:
        TrainingError: ``checkpointing`` with a network that has dropout: its training mode would change pictures.
    """
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    wanted = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    modes = [(module, module.training) for module in modules]
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    was = getattr(network, "is_gradient_checkpointing", False)
    vae, device, tiled = pipeline.vae, pipeline.vae.device, getattr(pipeline.vae, "use_tiling", False)
    try:
        for module in modules:
            module.requires_grad_(requires_grad=False).eval()
        if checkpointing:
            if any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules()):
                raise TrainingError("the U-Net has dropout, which gradient checkpointing would switch on; leave it out")
            network.enable_gradient_checkpointing()
            network.train()
        if tiling:
            vae.enable_tiling()
        yield
    finally:
        vae.to(device)
        if tiling and not tiled:
            vae.disable_tiling()
        if checkpointing and not was:
            network.disable_gradient_checkpointing()
        for parameter, before in wanted:
            parameter.requires_grad_(before)
        for module, training in modes:
            module.train(training)
