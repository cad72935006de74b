"""Statistics of paired comparisons: intervals, win rates, a test that assumes nothing, and what a sample can resolve.

Prompts are the sample: each contributes one number, the mean over its pictures. Two variants are compared prompt by
prompt, on the same noise, so what makes one prompt harder than another cancels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import numpy as np

Name = TypeVar("Name")

_RESAMPLES = 10_000
_EXACT = 12
"""Up to this many prompts every choice of signs is tried: 4,096 of them."""
_TWO_SIDED = 1.959964
"""The normal distribution's quantile at 0.975."""
_POWER = 0.841621
"""The normal distribution's quantile at 0.8."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def bootstrap_mean(values: np.ndarray, *, resamples: int = _RESAMPLES) -> Interval:
    """The mean of ``values (n,)`` with its 95 % percentile bootstrap interval (Efron 1979); always the same draws."""
    rng = np.random.default_rng(0)
    means = np.concatenate([rng.choice(values, (500, len(values))).mean(1) for _ in range(resamples // 500)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def win_rate(differences: np.ndarray) -> Interval:
    """The share of ``differences (n,)`` above zero, ties counting half, with Wilson's score interval (1927)."""
    wins = float((differences > 0).sum() + 0.5 * (differences == 0).sum())
    return wilson(wins, len(differences))


def wilson(wins: float, trials: int) -> Interval:
    """A share of ``trials`` with Wilson's 95 % score interval; within [0, 1] however few trials there are."""
    share, z2 = wins / trials, _TWO_SIDED**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = _TWO_SIDED / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return Interval(share, max(0.0, centre - spread), min(1.0, centre + spread))


def sign_flip(differences: np.ndarray, *, flips: int = _RESAMPLES) -> float:
    """Two-sided p of the mean of paired ``differences (n,)`` being zero, by flipping their signs (Fisher 1935).

    Exact for up to twelve prompts, otherwise from ``flips`` random choices of signs, always the same ones; the observed
    choice counts as one of them, so p is never 0. Differences that are all zero give 1.
    """
    n, observed = len(differences), abs(differences.sum())
    if n <= _EXACT:
        signs = np.array(list(product((-1.0, 1.0), repeat=n)))
        return float((np.abs(signs @ differences) >= observed - 1e-12 * observed).mean())
    rng = np.random.default_rng(0)
    sums = np.concatenate([rng.choice((-1.0, 1.0), (500, n)) @ differences for _ in range(flips // 500)])
    extreme = int((np.abs(sums) >= observed - 1e-12 * observed).sum())
    return (extreme + 1) / (len(sums) + 1)


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """p of several comparisons at once, each corrected for there being several (Holm 1979), in the given order."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def resolvable(differences: np.ndarray) -> float:
    """The smallest true mean that this many paired differences would show in four of five experiments, at 5 %.

    ``(z(0.975) + z(0.8)) · s / √n`` with the differences' own standard deviation; infinite for a single prompt.
    """
    if len(differences) < 2:
        return math.inf
    return (_TWO_SIDED + _POWER) * float(differences.std(ddof=1)) / math.sqrt(len(differences))
