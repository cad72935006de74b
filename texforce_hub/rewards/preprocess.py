"""Pictures as CLIP and BLIP read them: resized, cropped and normalised on their own device, with a gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def prepare(images: Tensor, size: int = 224) -> Tensor:
    """Pictures ``(b, 3, h, w)`` in [0, 1] as ``(b, 3, size, size)``, normalised, float32.

    The shorter side becomes ``size`` by bicubic interpolation with antialiasing, the middle is cut out. The values are
    those of Pillow's 8-bit pictures, which the published code uses, to 1/255: rounded before, between and after the two
    passes; for the gradient nothing is rounded.
    """
    height, width = images.shape[-2:]
    shorter = min(height, width)
    rows, columns = (int(size * side / shorter) for side in (height, width))
    across = _rounded(F.interpolate(_rounded(images.float()), (height, columns), mode="bicubic", antialias=True))
    resized = _rounded(F.interpolate(across, (rows, columns), mode="bicubic", antialias=True))
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    middle = resized[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (middle - mean) / std


def _rounded(values: Tensor) -> Tensor:
    """In [0, 1] and at multiples of 1/255, with the gradient of values that were not rounded."""
    inside = values.clamp(0, 1)
    return inside + ((inside * 255).round() / 255 - inside).detach()
