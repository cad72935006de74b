"""Draw prompts with a shapes pipeline, through its ordinary call, and score the pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from texforce_hub.shapes import GUIDANCE, INFERENCE_STEPS
from texforce_hub.shapes.grammar import parse
from texforce_hub.shapes.reward import score_scenes

BATCH = 48


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    seed: int,
    *,
    steps: int = INFERENCE_STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """One picture per prompt, ``(n, 3, 32, 32)`` in [0, 1]; picture ``i`` starts from the noise of seed ``seed + i``.

    The noise is drawn on the CPU, so that it is the same on every device.
    """
    pictures = []
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        noise = [Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
        pictures.append(pipeline(batch, generator=noise, **settings).images.float())
    return torch.cat(pictures)


def score(pipeline: Any, prompts: Sequence[str], seed: int, **how: Any) -> Tensor:
    """Alignment of one picture per prompt, ``(n,)`` in [0, 1], on the CPU; ``how`` as for :func:`draw`."""
    with torch.no_grad():
        return score_scenes(draw(pipeline, prompts, seed, **how).cpu(), [parse(prompt) for prompt in prompts])
