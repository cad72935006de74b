"""A pipeline that learns nothing while something beside it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def frozen(pipeline: Any) -> Iterator[None]:
    """No gradient for the pipeline's weights, and no dropout; afterwards both as before."""
    modules = [pipeline.text_encoder, pipeline.unet, pipeline.vae]
    wanted = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    modes = [(module, module.training) for module in modules]
    try:
        for module in modules:
            module.requires_grad_(requires_grad=False).eval()
        yield
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)
        for module, training in modes:
            module.train(training)
