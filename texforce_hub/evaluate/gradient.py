"""The gradient of a differentiable reward at a stack's weights, through all denoising steps, and the climb along it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from texforce_hub.apply.weighted import weighted_adapters
from texforce_hub.errors import ConfigError
from texforce_hub.evaluate.drawing import Job, quiet
from texforce_hub.evaluate.evaluation import Sampling
from texforce_hub.evaluate.genome import Genome
from texforce_hub.generate.draw import DrawSettings, sample
from texforce_hub.generate.prompts.weighting import cuts_said
from texforce_hub.rewards.reward import Reward

_FIRST_STEP = 0.1
"""How far a weight moves in the first step, as a share of the range between the bounds."""
_BETAS = (0.8, 0.95)
"""Adam's: how much of the gradients before is remembered; the noise is the same in every step, so little is needed."""

Ascent = Iterator[tuple[np.ndarray, np.ndarray, float]]
"""Of each step: the pictures' rewards where it began, the best vector so far, how far the step went."""


def check_differentiable(rewards: Sequence[Reward]) -> None:
    """Refuse rewards without a gradient.

    Raises:
        ConfigError: names the first.
    """
    if blunt := [reward.name for reward in rewards if not reward.differentiable]:
        raise ConfigError(f"the reward {blunt[0]!r} has no gradient; leave --gradient out, and it is searched without")


def climb(
    pipe: Any,
    genome: Genome,
    start: np.ndarray,
    bounds: tuple[float, float],
    prompts: Sequence[str],
    rewards: Sequence[Reward],
    sampling: Sampling,
    steps: int,
    *,
    strict: bool = True,
) -> Ascent:
    """Adam (Kingma & Ba 2015) from ``start`` upwards, within the bounds; its steps get shorter towards the end.

    Raises:
        ConfigError: a pipeline whose call cannot be differentiated, or a layer that is not low rank.
    """
    low, high = bounds
    vector, best, highest = start.copy(), start.copy(), -np.inf
    first, second = np.zeros_like(vector), np.zeros_like(vector)
    for number in range(steps):
        values, slope = values_and_gradient(pipe, genome, vector, prompts, rewards, sampling, strict=strict)
        if (value := float(values.mean())) > highest:
            best, highest = vector.copy(), value
        first = _BETAS[0] * first + (1 - _BETAS[0]) * slope
        second = _BETAS[1] * second + (1 - _BETAS[1]) * slope**2
        mean, square = first / (1 - _BETAS[0] ** (number + 1)), second / (1 - _BETAS[1] ** (number + 1))
        rate = _FIRST_STEP * (high - low) * (1 - number / steps)
        moved = np.clip(vector + rate * mean / (np.sqrt(square) + 1e-12), low, high)
        distance, vector = float(np.abs(moved - vector).max()), moved
        yield values, best, distance


def values_and_gradient(
    pipe: Any,
    genome: Genome,
    vector: np.ndarray,
    prompts: Sequence[str],
    rewards: Sequence[Reward],
    sampling: Sampling,
    *,
    strict: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """The rewards' weighted sums ``(prompts · seeds,)``, and the gradient of their mean at the vector, ``(numbers,)``.

    The noise is that of :class:`~texforce_hub.evaluate.drawing.Easel`. The graph of a batch through all its steps is in
    memory at once: smaller batches, fewer steps need less.

    Raises:
        ConfigError: as :func:`climb`.
    """
    jobs = [Job("", index, text, seed) for index, text in enumerate(prompts) for seed in sampling.seeds]
    numbers = torch.tensor(vector, dtype=torch.float32, requires_grad=True)
    values, slope = list[float](), torch.zeros_like(numbers)
    with quiet(pipe), cuts_said(), torch.enable_grad():
        for i in range(0, len(jobs), sampling.batch_size):
            some = jobs[i : i + sampling.batch_size]
            scores = _score(pipe, genome, numbers, some, rewards, sampling, strict=strict)
            (part,) = torch.autograd.grad(scores.sum() / len(jobs), numbers)
            values, slope = values + scores.tolist(), slope + part
    return np.array(values), slope.double().numpy()


def _score(
    pipe: Any,
    genome: Genome,
    numbers: torch.Tensor,
    jobs: Sequence[Job],
    rewards: Sequence[Reward],
    sampling: Sampling,
    *,
    strict: bool,
) -> torch.Tensor:
    """The rewards' weighted sum of each of some pictures."""
    texts = [job.prompt for job in jobs]
    settings = DrawSettings(tuple(texts), inference_steps=sampling.inference_steps, guidance=sampling.guidance)
    given: dict[str, Any] = {"prompt": texts}
    if sampling.negative_prompt:
        given["negative_prompt"] = [sampling.negative_prompt] * len(texts)

    def weight_of(index: int, layer: str) -> torch.Tensor:
        return numbers[genome.number_of(index, layer)]

    with weighted_adapters(pipe, genome.entries, weight_of, strict=strict):
        pictures = sample(pipe, settings, [job.noise for job in jobs], given, output_type="pt", differentiable=True)
    scores = [reward.weight * reward(pictures.float(), texts).cpu() for reward in rewards]
    return torch.stack(scores).sum(0)
