"""What an evaluation found: scores of every variant, and means, differences and rates with their intervals."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from texforce_hub.evaluate.statistics import Interval, bootstrap_mean, holm, resolvable, sign_flip, win_rate
from texforce_hub.notebook import Bar, Cell, table


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; recorded with every figure."""

    seeds: tuple[int, ...] = (0, 1)  # a picture per prompt and seed
    inference_steps: int = 15  # denoising steps of the pipeline's own scheduler
    guidance: float = 5.0
    negative_prompt: str = ""
    batch_size: int = 64  # pictures in one call; the result does not depend on it beyond rounding


@dataclass(frozen=True)
class Comparison:
    """One variant against another, paired by prompt.

    difference: the mean of the first minus the other
    wins: the share of prompts on which the first is better, ties counting half
    p: of a difference of zero, by flipping signs; two-sided, not corrected for other comparisons
    resolvable: the smallest true difference that this many prompts show in four of five experiments
    """

    difference: Interval
    wins: Interval
    p: float
    resolvable: float


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Scores of several variants on the same prompts and noise.

    ``scores[reward][variant]`` is an array ``(prompts, seeds)``.
    """

    prompts: tuple[str, ...]
    sampling: Sampling
    scores: Mapping[str, Mapping[str, np.ndarray]]

    def __repr__(self) -> str:
        """Up to three lines: what was drawn, and the first variants' means with their intervals."""
        drawn = f"{len(self.prompts)} prompts, {len(self.sampling.seeds)} seeds, {', '.join(self.rewards)}"
        means = [f"{name} {self.mean(name)}" for name in self.variants[:2]]
        more = [f"and {len(self.variants) - 2} variants more"] if len(self.variants) > 2 else []
        return f"Evaluation({drawn}:\n  {', '.join([*means, *more])})"

    def _repr_html_(self) -> str:
        """A notebook's tables, one for each reward: every variant's mean and interval, and against the first."""
        return "".join(map(self._tabulate, self.rewards))

    def _tabulate(self, reward: str) -> str:
        first, *_ = self.variants
        means = {name: self.mean(name, reward=reward) for name in self.variants}
        least, most = min(mean.low for mean in means.values()), max(mean.high for mean in means.values())
        width = (most - least) or 1.0
        rows: list[tuple[Cell, ...]] = []
        for name, mean in means.items():
            bar = Bar(str(mean), (mean.high - least) / width, (mean.low - least) / width)
            against = self.compare(name, first, reward=reward)
            others = ("", "") if name == first else (str(against.difference), f"{against.wins.mean:.0%}")
            rows.append((name, bar, *others))
        title = f"{reward}: {len(self.prompts)} prompts, {len(self.sampling.seeds)} seeds, 95 % intervals"
        return table(title, ("variant", "mean", f"minus {first}", "prompts better"), rows)

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
        return bootstrap_mean(self._paired(variant, other, reward))

    def compare(self, variant: str, other: str, *, reward: str | None = None) -> Comparison:
        """``variant`` against ``other``: difference, win rate, p and what so many prompts can tell apart."""
        paired = self._paired(variant, other, reward)
        return Comparison(bootstrap_mean(paired), win_rate(paired), sign_flip(paired), resolvable(paired))

    def corrected(self, *, reward: str | None = None) -> dict[str, float]:
        """p of every variant against the first, corrected for there being several (Holm 1979)."""
        first, *others = self.variants
        return holm({name: sign_flip(self._paired(name, first, reward)) for name in others})

    def _paired(self, variant: str, other: str, reward: str | None) -> np.ndarray:
        differences: np.ndarray = self.per_prompt(variant, reward=reward) - self.per_prompt(other, reward=reward)
        return differences


def describe(result: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON can hold it: settings, and for every reward and variant its figures and its prompts."""
    return {
        "prompts": result.prompts,
        "sampling": asdict(result.sampling),
        "rewards": {reward: _describe_reward(result, reward) for reward in result.rewards},
    }


def _describe_reward(result: Evaluation, reward: str) -> dict[str, Any]:
    first = result.variants[0]
    corrected = result.corrected(reward=reward)
    described = {}
    for name in result.variants:
        against = result.compare(name, first, reward=reward)
        described[name] = {
            **asdict(result.mean(name, reward=reward)),
            f"vs_{first}": asdict(against.difference),
            "wins": asdict(against.wins),
            "p": against.p,
            "p_holm": corrected.get(name, 1.0),
            "resolvable": against.resolvable if math.isfinite(against.resolvable) else None,
            "per_prompt": result.per_prompt(name, reward=reward).tolist(),
        }
    return described
