"""What a run will train on and what it will cost, from the schedule and one step that is timed and thrown away."""

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Generator, nn
from torch.utils.flop_counter import FlopCounterMode

from texforce_hub.device import no_denormals
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.memory import saved_bytes
from texforce_hub.train.policies.frozen import frozen
from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.policies.steps import grade_steps, sensitivity
from texforce_hub.train.run import make_run
from texforce_hub.train.run_folder import RunFolder


@dataclass(frozen=True)
class StepCost:
    """A denoising step: how sensitive it is, its share of the chain's noise, and whether it is trained on."""

    timestep: int
    sensitivity: float
    share: float
    graded: bool


@dataclass(frozen=True)
class Estimate:
    """What a run does and costs; a unit is one picture through the U-Net once."""

    steps: tuple[StepCost, ...]
    batch_size: int
    units: int  # forward passes of a training step, guidance included
    backward_units: int
    tflop: float  # of the U-Net's part of a training step
    weights_gib: float  # of the base, all its parts
    gib: float  # kept for the backward pass of one U-Net call
    seconds: float  # of a training step
    total_seconds: float  # of all steps, without validations and sheets

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The costs in words."""
        return [
            f"a step: {self.units} U-Net forwards and {self.backward_units} backwards of one picture, "
            f"{self.tflop:.3g} TFLOP, {self.seconds:.1f} s here",
            f"memory: {self.weights_gib:.3g} GiB of weights, and {self.gib:.3g} GiB that a U-Net call of "
            f"{self.batch_size} pictures keeps for its backward pass",
            f"the run: {self.total_seconds / 60:.1f} minutes, and validations",
        ]


def estimate(config: TrainConfig, *, pipeline: Any = None) -> Estimate:
    """Load what the run needs, take one step and forget it.

    Raises:
        TexForceHubError: whatever would stop the run itself.
    """
    quiet = replace(config, validate_every=0)
    with tempfile.TemporaryDirectory() as folder, no_denormals(), torch.random.fork_rng(devices=[]):
        run = make_run(quiet, pipeline, RunFolder(Path(folder)))
        policy = run.policy
        with frozen(policy.pipeline, checkpointing=config.checkpointing, tiling=config.tiling):
            kept = saved_bytes(policy)
            began = monotonic()
            run.take_step()
            seconds = monotonic() - began
            forward, backward = count_flops(policy)
    chain = policy.make_steps(config.inference_steps)
    graded = [] if config.algorithm == "direct" else grade_steps(chain, config.share)
    w = sensitivity(chain)
    shares = (w.square() / w.square().sum().clamp(min=1e-12)).tolist()
    rows = zip(chain.timesteps.tolist(), w.tolist(), shares, strict=True)
    units, pulls = count_units(config, len(graded))
    return Estimate(
        tuple(StepCost(t, x, share, k in graded) for k, (t, x, share) in enumerate(rows)),
        policy.config.batch_size,
        units,
        pulls,
        (units * forward + pulls * backward) / 1e12,
        _count_weights(policy) / 2**30,
        kept * min(policy.config.batch_size, config.images) / 2**30,
        seconds,
        seconds * config.steps,
    )


def _count_weights(policy: Policy) -> int:
    """Bytes of the pipeline's parameters."""
    modules = [part for part in policy.pipeline.components.values() if isinstance(part, nn.Module)]
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def count_units(config: TrainConfig, graded: int) -> tuple[int, int]:
    """Pictures through the U-Net forwards, and those backwards, of one training step."""
    sides, images = (2 if config.guidance > 1 else 1), config.images
    opened = 2 if config.guidance > 1 and config.uncond == "full" else 1
    chain = sides * config.inference_steps * images
    if config.algorithm == "streaming":
        return chain, opened * graded * images
    if config.algorithm == "ppo":
        pairs = config.passes * images * min(config.train_timesteps or graded, graded)
        return chain + sides * pairs, opened * pairs
    late = {"refl": round(0.7 * config.inference_steps), "draft_lv": config.inference_steps + 2}
    pulls = {"refl": 1, "draft_lv": 2, "truncated": config.direct_steps}[config.direct]
    return sides * late.get(config.direct, config.inference_steps) * images, opened * pulls * images


def count_flops(policy: Policy) -> tuple[float, float]:
    """FLOPs of the U-Net for one picture, forwards and backwards to the text (recomputation included)."""
    rows, leaves = policy.leaves(policy.rows([""], 1)._replace(negative=None))
    latents, time = policy.draw_noise(1, Generator().manual_seed(0)), policy.make_steps(2).timesteps[0]
    with FlopCounterMode(display=False) as forward, torch.enable_grad():
        output = policy.predict(latents, time, rows)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(output.sum(), leaves)
    return float(forward.get_total_flops()), float(backward.get_total_flops())
