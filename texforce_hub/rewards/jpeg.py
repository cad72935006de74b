"""Compressibility as JPEG, the reward without a gradient that DDPO (arXiv 2305.13301) introduced."""

from collections.abc import Sequence
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from texforce_hub.rewards.functions import Score


def jpeg(device: torch.device) -> Score:
    """Minus the size in kB (1,000 bytes) at quality 95; prompts are ignored. Weight -1 asks for rich detail."""
    del device

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        del prompts
        pixels = (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([-_size(Image.fromarray(picture)) / 1000 for picture in pixels], device=images.device)

    return score


def _size(picture: Image.Image) -> int:
    buffer = BytesIO()
    picture.save(buffer, format="JPEG", quality=95)
    return buffer.tell()
