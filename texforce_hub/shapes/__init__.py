"""The embedded default: a tiny real Stable Diffusion that draws coloured shapes, and its world.

``--base shapes`` everywhere means the pipeline in :data:`WEIGHTS`. Grammar, renderer and reward are in
the modules beside; ``build`` trains the weights from nothing.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"

# How the embedded pipeline is meant to be sampled; every figure of its card is at these settings.
INFERENCE_STEPS = 15
GUIDANCE = 5.0
