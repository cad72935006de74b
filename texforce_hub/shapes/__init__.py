"""The embedded default: a tiny real Stable Diffusion that draws coloured shapes, and its world.

``--base shapes`` everywhere means the pipeline in :data:`WEIGHTS`; ``shapes-turbo`` is the same with the U-Net and
scheduler in :data:`TURBO`, and draws in one step. Grammar, renderer and reward are in the modules beside; ``build``
trains the weights from nothing, ``distil`` the turbo U-Net from them.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
TURBO = Path(__file__).parent / "turbo"

# How the embedded pipeline is meant to be sampled; every figure of its card is at these settings.
INFERENCE_STEPS = 15
GUIDANCE = 5.0

SHAPES = {"shapes": (INFERENCE_STEPS, GUIDANCE), "shapes-turbo": (1, 1.0)}
"""The bases that ship, and the denoising steps and guidance that each is meant for."""
