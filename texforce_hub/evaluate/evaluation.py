"""What an evaluation found: scores of every variant, and means, differences and rates with their intervals."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; recorded with every figure."""

    seeds: tuple[int, ...] = (0, 1)  # a picture per prompt and seed
    inference_steps: int = 15  # denoising steps of the pipeline's own scheduler
    guidance: float = 5.0
    negative_prompt: str = ""
    batch_size: int = 64  # pictures in one call; the result does not depend on it beyond rounding


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of several variants on the same prompts and noise.

    ``scores[reward][variant]`` is an array ``(prompts, seeds)``.
    """

    prompts: tuple[str, ...]
    sampling: Sampling
    scores: Mapping[str, Mapping[str, np.ndarray]] = field(repr=False)

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of the rewards; the first is what is looked at unless another is named."""
        return tuple(self.scores)

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants."""
        return tuple(self.scores[self.rewards[0]])

    def per_prompt(self, variant: str, *, reward: str | None = None) -> np.ndarray:
        """Means over the seeds, ``(prompts,)``."""
        means: np.ndarray = self.scores[reward or self.rewards[0]][variant].mean(1)
        return means

    def mean(self, variant: str, *, reward: str | None = None) -> Interval:
        """A variant's mean over prompts, with its interval."""
        return bootstrap_mean(self.per_prompt(variant, reward=reward))

    def difference(self, variant: str, other: str, *, reward: str | None = None) -> Interval:
        """Mean of ``variant`` minus ``other``, paired by prompt, with its interval."""
        return bootstrap_mean(self.per_prompt(variant, reward=reward) - self.per_prompt(other, reward=reward))


def bootstrap_mean(values: np.ndarray, *, resamples: int = _RESAMPLES) -> Interval:
    """The mean of ``values (n,)`` with its 95 % percentile bootstrap interval (Efron 1979); always the same draws."""
    rng = np.random.default_rng(0)
    means = np.concatenate([rng.choice(values, (500, len(values))).mean(1) for _ in range(resamples // 500)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def describe(result: "Evaluation") -> dict[str, Any]:
    """An evaluation as JSON can hold it: settings, and for every reward and variant mean, interval and prompts."""
    from dataclasses import asdict

    first = result.variants[0]
    return {
        "prompts": result.prompts,
        "sampling": asdict(result.sampling),
        "rewards": {
            reward: {
                name: {
                    **asdict(result.mean(name, reward=reward)),
                    f"vs_{first}": asdict(result.difference(name, first, reward=reward)),
                    "per_prompt": result.per_prompt(name, reward=reward).tolist(),
                }
                for name in result.variants
            }
            for reward in result.rewards
        },
    }
