"""What an evaluation found: scores of every variant, and means, differences and rates with their intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any, cast

import numpy as np

from texforce_hub.errors import ConfigError
from texforce_hub.evaluate.statistics import Interval, bootstrap_mean, holm, resolvable, sign_flip, win_rate
from texforce_hub.notebook import Bar, Cell, table

DIVERSITY = "diversity"
"""The measure that no reward gives: how different a prompt's pictures are from seed to seed."""
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; recorded with every figure."""

    seeds: tuple[int, ...] = (0, 1)  # a picture per prompt and seed
    inference_steps: int = 15  # denoising steps of the pipeline's own scheduler
    guidance: float = 5.0
    negative_prompt: str = ""
    batch_size: int = 64  # pictures in one call; the result does not depend on it beyond rounding

    def check(self) -> None:
        """Refuse what cannot be drawn.

        Raises:
            ConfigError: names the setting, what it is, and what is expected.
        """
        seeds, guidance = cast(Any, self.seeds), cast(Any, self.guidance)
        if not isinstance(seeds, tuple | list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise ConfigError(f"seeds {seeds!r:.80}; expected whole numbers from 0, e.g. (0, 1)")
        if not 1 <= len(seeds) <= MOST_SEEDS or len(set(seeds)) < len(seeds):
            raise ConfigError(f"{len(seeds)} seeds of every prompt; expected 1 to {MOST_SEEDS}, all different")
        for name, most in (("inference_steps", 1000), ("batch_size", 10_000)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"{name} is {value!r}; expected a whole number from 1 to {most:,}")
        if not isinstance(guidance, int | float) or not math.isfinite(guidance):
            raise ConfigError(f"guidance is {guidance!r}; expected a finite number")


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


@dataclass(frozen=True)
class Compared:
    """A comparison among several: of which variant with which other, and its p corrected for there being several."""

    stack: str
    other: str
    comparison: Comparison
    p_holm: float


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Scores of several variants on the same prompts and noise.

    ``scores[reward][variant]`` is an array ``(prompts, seeds)``, ``diversity[variant]`` one ``(prompts,)``: how
    different a prompt's pictures are from seed to seed, see :func:`~texforce_hub.evaluate.diversity.spread`; empty with
    one seed.
    """

    prompts: tuple[str, ...]
    sampling: Sampling
    scores: Mapping[str, Mapping[str, np.ndarray]]
    diversity: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Up to three lines: what was drawn, and the first variants' means with their intervals."""
        drawn = f"{len(self.prompts)} prompts, {len(self.sampling.seeds)} seeds, {', '.join(self.rewards)}"
        means = [f"{name} {self.mean(name)}" for name in self.variants[:2]]
        more = [f"and {len(self.variants) - 2} variants more"] if len(self.variants) > 2 else []
        return f"Evaluation({drawn}:\n  {', '.join([*means, *more])})"

    def _repr_html_(self) -> str:
        """A notebook's tables, one for each reward: every variant's mean and interval, and against the first."""
        return "".join(map(self._tabulate, self.measures))

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
    def measures(self) -> tuple[str, ...]:
        """The rewards, and ``diversity`` where there are several seeds: what ``reward=`` may name."""
        return (*self.rewards, *([DIVERSITY] if self.diversity else []))

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants."""
        return tuple(self.scores[self.rewards[0]])

    def per_prompt(self, variant: str, *, reward: str | None = None) -> np.ndarray:
        """Means over the seeds, ``(prompts,)``; of ``diversity`` each prompt's own.

        Raises:
            ConfigError: no such variant or measure; those that there are, are named.
        """
        for name, known in ((variant, self.variants), (reward or self.rewards[0], self.measures)):
            if name not in known:
                raise ConfigError(f"no {name!r} in this evaluation; there are {', '.join(known)}")
        if reward == DIVERSITY:
            return self.diversity[variant]
        means: np.ndarray = self.scores[reward or self.rewards[0]][variant].mean(1)
        return means

    def only(self, numbers: Sequence[int]) -> "Evaluation":
        """The same of some of the prompts, by their numbers."""
        chosen = list(numbers)
        scores = {reward: {name: values[chosen] for name, values in of.items()} for reward, of in self.scores.items()}
        diversity = {name: values[chosen] for name, values in self.diversity.items()}
        return replace(self, prompts=tuple(self.prompts[i] for i in chosen), scores=scores, diversity=diversity)

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

    def comparisons(
        self, *, reward: str | None = None, pairs: bool = False, among: Sequence[str] | None = None
    ) -> list[Compared]:
        """Every variant against the first, with ``pairs`` every later one against every earlier one besides.

        p is corrected for all comparisons that are given (Holm 1979). ``among``: of these variants alone.
        """
        chosen_from = [name for name in self.variants if among is None or name in (*among, self.variants[0])]
        wanted = [(name, other) for other, name in combinations(chosen_from, 2)]
        chosen = [(name, other) for name, other in wanted if pairs or other == self.variants[0]]
        compared = {names: self.compare(*names, reward=reward) for names in chosen}
        corrected = holm({names: comparison.p for names, comparison in compared.items()})
        return [Compared(*names, comparison, corrected[names]) for names, comparison in compared.items()]

    def corrected(self, *, reward: str | None = None) -> dict[str, float]:
        """p of every variant against the first, corrected for there being several (Holm 1979)."""
        return {compared.stack: compared.p_holm for compared in self.comparisons(reward=reward)}

    def _paired(self, variant: str, other: str, reward: str | None) -> np.ndarray:
        differences: np.ndarray = self.per_prompt(variant, reward=reward) - self.per_prompt(other, reward=reward)
        return differences


def describe(result: Evaluation, *, pairs: bool = False, apart: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
    """An evaluation as JSON can hold it: of every measure the means, the comparisons and what each prompt scored.

    ``apart``: variants that are compared with the first alone, and whose p is corrected for those beside them alone.
    """
    measures = {measure: _describe_measure(result, measure, pairs=pairs, apart=apart) for measure in result.measures}
    return {"prompts": len(result.prompts), "measures": measures}


def _describe_measure(
    result: Evaluation, measure: str, *, pairs: bool, apart: Sequence[Sequence[str]]
) -> dict[str, Any]:
    others = {name for names in apart for name in names}
    together = [name for name in result.variants if name not in others]
    comparisons = result.comparisons(reward=measure, pairs=pairs, among=together)
    for names in apart:
        comparisons += result.comparisons(reward=measure, among=names)
    return {
        "means": {name: asdict(result.mean(name, reward=measure)) for name in result.variants},
        "comparisons": list(map(_describe_comparison, comparisons)),
        "per_prompt": {name: result.per_prompt(name, reward=measure).tolist() for name in result.variants},
    }


def _describe_comparison(compared: Compared) -> dict[str, Any]:
    numbers = asdict(compared.comparison)
    if not math.isfinite(numbers["resolvable"]):
        numbers["resolvable"] = None  # of one prompt
    return {"stack": compared.stack, "other": compared.other, **numbers, "p_holm": compared.p_holm}
