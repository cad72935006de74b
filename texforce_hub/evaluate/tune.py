"""Choose a stack's weights by a reward: searched on one half of the prompts, reported on the other half.

All candidates of a generation see the same prompts and the same noise, so that their differences are the weights'
(common random numbers), and share batches as far as that is exact. The search is Hansen's (arXiv 1604.00772), by the
``cma`` package.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from texforce_hub.arguments import Pipeline, check_kind, check_pipeline, check_texts
from texforce_hub.errors import ConfigError, PromptError
from texforce_hub.evaluate.drawing import Easel, Variant
from texforce_hub.evaluate.evaluation import Evaluation, Sampling
from texforce_hub.evaluate.genome import Genome, Per
from texforce_hub.evaluate.gradient import check_differentiable, climb
from texforce_hub.evaluate.progress import PATIENCE, Progress
from texforce_hub.evaluate.statistics import Interval
from texforce_hub.evaluate.variants import check_rewards, evaluate_variants, score_jobs
from texforce_hub.generate.prompts.sets import refuse_markup
from texforce_hub.hub.block_weights import is_number
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.stack import Item, read_stack
from texforce_hub.rewards.reward import Reward

_FEWEST = 4
"""Prompts without which there is nothing to search on and to report on."""
_SMALLEST_STEP = 0.02
"""Below this, in weight, pictures no longer change."""
_SHORTEST_MOVE = 0.005
"""A step along the gradient that moves no weight by more is the last."""
_COUNTS = {"generations": (1, 10_000), "population": (4, 10_000), "patience": (1, 10_000), "seed": (0, 2**31 - 1)}
"""The smallest and the largest that each may be."""

Ended = Literal["generations", "resolved", "unresolved", "converged"]
"""Why a search ended: all generations were done; a gain over the start was told apart from chance and no further one
could be; no gain could be; its steps were too short to see."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation of the search: its candidates' mean rewards, best and mean, and how far it steps.

    gain: of the weights that the generation began with over those of the start, paired by prompt of the search
    """

    best: float
    mean: float
    step: float
    gain: Interval


@dataclass(frozen=True, eq=False)
class Tuning:
    """Chosen weights, the search that led there, and what they are worth on prompts that it did not see.

    refs: the stack's references with the chosen weights
    evaluation: the variants ``base``, each adapter alone at weight 1, ``equal`` (all at the mean weight that the search
        began with), ``start`` (where it began, if those were not equal) and ``tuned``
    searched: the prompts of the search; the evaluation's own are the others
    ended: why the search ended
    """

    refs: tuple[AdapterRef, ...]
    evaluation: Evaluation
    generations: tuple[Generation, ...]
    searched: tuple[str, ...]
    ended: Ended = "generations"

    @property
    def start(self) -> str:
        """The variant that the search began with."""
        return "start" if "start" in self.evaluation.variants else "equal"

    def __str__(self) -> str:
        return " + ".join(map(str, self.refs))


def tune_weights(
    pipe: Pipeline,
    adapters: Item | Sequence[Item],
    prompts: Sequence[str],
    rewards: Sequence[Reward],
    *,
    per: Per = "adapter",
    generations: int = 12,
    population: int = 8,
    patience: int = PATIENCE,
    bounds: tuple[float, float] = (0.0, 1.5),
    gradient: bool = False,
    sampling: Sampling | None = None,
    strict: bool = True,
    seed: int = 0,
    on_generation: Callable[[int, Generation], None] | None = None,
) -> Tuning:
    """Search the weights of a stack that maximise the sum of the rewards, each at its own weight.

    Args:
        pipe: afterwards it is as it was.
        adapters: the stack, as ``apply_adapter`` takes it; its weights are where the search begins.
        prompts: at least four; half of them, chosen by their text, are for the search, the others for the report.
        per: whether an adapter, each of its parts, or each of its blocks has a weight of its own.
        generations, population: how many rounds of how many candidates, at most; the search ends before when its steps
            are below 0.02.
        patience: so many generations in a row without a gain that the search's prompts can tell apart from chance
            (:class:`~texforce_hub.evaluate.progress.Progress`) end it too; with ``generations`` never.
        bounds: of every weight, those of the start among them.
        gradient: follow the rewards' gradient through all denoising steps, one step a generation, instead of searching;
            ``population`` has no meaning then. For rewards that are differentiable and adapters that are low rank.
        strict: as in ``apply_adapter``.
        sampling: as in ``evaluate_variants``.
        seed: of the search, from 0 to 2³¹ − 1.

    Raises:
        ConfigError: no rewards, impossible bounds or numbers, a stack that follows a schedule, ``cma`` is missing, or a
            gradient that there is not.
        PromptError: too few prompts, or some with tags.
        MatchError: a stack that does not fit.

    Example:
        >>> from texforce_hub import load_pipeline, tune_weights
        >>> from texforce_hub.evaluate.evaluation import Sampling
        >>> from texforce_hub.rewards.reward import resolve_reward
        >>> prompts = ["a lime disc", "a red circle", "a blue square", "a green disc"]
        >>> tuned = tune_weights(
        ...     load_pipeline("shapes", device="cpu"), "shapes-colour", prompts, [resolve_reward("brightness")],
        ...     generations=1, population=4, sampling=Sampling((0,), inference_steps=1),
        ... )
        >>> tuned.evaluation.variants
        ('base', 'equal', 'tuned')
    """
    check_pipeline(pipe)
    sampling = sampling or Sampling()
    check_rewards(rewards)
    counts = {"generations": generations, "population": population, "patience": patience, "seed": seed}
    _check(per, bounds, counts)
    check_kind(sampling, Sampling, "give Sampling(seeds, …)").check()
    if gradient:
        check_differentiable(rewards)
    searched, reported = split_in_half(prompts)
    genome = Genome.of(read_stack(adapters), per)
    start = genome.start
    _check_start(genome, bounds)
    history: list[Generation] = []
    best = start
    progress = Progress(patience)
    task = _Task(pipe, genome, searched, rewards, sampling, progress, strict=strict)
    rounds = (
        task.climb(start, bounds, generations)
        if gradient
        else task.search(start, bounds, generations, population, seed)
    )
    for vector, generation in rounds:
        best = vector
        history.append(generation)
        if on_generation is not None:
            on_generation(len(history), generation)
    variants = _variants(genome, start, best)
    evaluation = evaluate_variants(pipe, variants, reported, rewards, sampling=sampling, strict=strict)
    ended = _why(history, generations, progress)
    return Tuning(genome.refs(best), evaluation, tuple(history), tuple(searched), ended)


def split_in_half(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts to search on and prompts to report on, by their text: the same whatever else is in the list.

    Raises:
        PromptError: fewer than four different ones.
    """
    prompts = check_texts(prompts)
    refuse_markup(prompts)
    ordered = sorted(dict.fromkeys(prompts), key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    if len(ordered) < _FEWEST:
        raise PromptError(f"{len(ordered)} different prompts; expected at least {_FEWEST}: half of them are held out")
    return ordered[::2], ordered[1::2]


def _why(history: Sequence[Generation], generations: int, progress: Progress) -> Ended:
    if progress.is_over:
        return "resolved" if history[-1].gain.low > 0 else "unresolved"
    return "generations" if len(history) == generations else "converged"


def _check_start(genome: Genome, bounds: tuple[float, float]) -> None:
    for (index, name), weight in zip(genome.keys, genome.start, strict=True):
        if not bounds[0] <= weight <= bounds[1]:
            of = genome.entries[index].label + (f", {name}" if name else "")
            low, high = bounds
            raise ConfigError(f"{of}: begins at weight {weight:g}, which is not within the bounds {low:g} to {high:g}")


def _check(per: str, bounds: Any, counts: Mapping[str, Any]) -> None:
    if per not in get_args(Per):
        raise ConfigError(f"per {per!r}; expected one of {', '.join(get_args(Per))}")
    for name, count in counts.items():
        least, most = _COUNTS[name]
        if type(count) is not int or not least <= count <= most:
            raise ConfigError(f"{name} is {count!r:.80}; expected a whole number from {least} to {most}")
    pair = isinstance(bounds, tuple | list) and len(bounds) == 2 and all(map(is_number, bounds))
    if not pair or not bounds[0] < bounds[1]:
        raise ConfigError(f"bounds {bounds!r:.80}; expected two finite numbers, the lower one first")


def _search(
    start: np.ndarray, bounds: tuple[float, float], generations: int, population: int, seed: int
) -> Iterator[tuple[list[np.ndarray], Callable[[list[float]], np.ndarray], Callable[[], float]]]:
    """Generations of candidate vectors; each is told its scores, which gives the search's centre."""
    try:
        import cma
    except ImportError as error:
        raise ConfigError("tuning needs the cma package: pip install 'texforce-hub[tune]'") from error
    low, high = bounds
    options = {"popsize": population, "bounds": [low, high], "seed": seed + 1, "verbose": -9, "maxiter": generations}
    vector = start if len(start) > 1 else np.append(start, start)  # the package searches two dimensions and more
    strategy = cma.CMAEvolutionStrategy(vector, 0.2 * (high - low), options)
    while not strategy.stop() and max(strategy.stds) > _SMALLEST_STEP:
        candidates = strategy.ask()

        def tell(scores: list[float], asked: list[np.ndarray] = candidates) -> np.ndarray:
            strategy.tell(asked, [-score for score in scores])
            centre: np.ndarray = np.clip(strategy.result.xfavorite, low, high)[: len(start)]
            return centre

        yield [candidate[: len(start)] for candidate in candidates], tell, lambda: float(strategy.sigma)


@dataclass(frozen=True)
class _Task:
    """What the weights are searched for: a reward of pictures of some prompts."""

    pipe: Any
    genome: Genome
    prompts: Sequence[str]
    rewards: Sequence[Reward]
    sampling: Sampling
    progress: Progress = field(default_factory=Progress)
    strict: bool = True

    def search(
        self, start: np.ndarray, bounds: tuple[float, float], generations: int, population: int, seed: int
    ) -> Iterator[tuple[np.ndarray, Generation]]:
        """After each generation of CMA-ES the best vector, and how the generation went.

        The search's centre is drawn beside the candidates: it is what is compared with the start.
        """
        centre = start
        for vectors, tell, step in _search(start, bounds, generations, population, seed):
            *rows, of_centre = self.score([*vectors, centre])
            gain = self.progress.note(self._by_prompt(of_centre), list(map(self._by_prompt, rows)))
            scores = [float(row.mean()) for row in rows]
            centre = tell(scores)
            yield centre, Generation(max(scores), float(np.mean(scores)), step(), gain)
            if self.progress.is_over:
                return

    def climb(
        self, start: np.ndarray, bounds: tuple[float, float], steps: int
    ) -> Iterator[tuple[np.ndarray, Generation]]:
        """After each step along the gradient the best vector, and how it went; until steps are too short to see."""
        drawn = self.prompts, self.rewards, self.sampling
        for scores, best, distance in climb(self.pipe, self.genome, start, bounds, *drawn, steps, strict=self.strict):
            value, gain = float(scores.mean()), self.progress.note(self._by_prompt(scores))
            yield best, Generation(value, value, distance, gain)
            if distance < _SHORTEST_MOVE or self.progress.is_over:
                return

    def _by_prompt(self, scores: np.ndarray) -> np.ndarray:
        """The mean over the seeds of scores ``(prompts · seeds,)``."""
        means: np.ndarray = scores.reshape(len(self.prompts), -1).mean(1)
        return means

    def score(self, vectors: Sequence[np.ndarray]) -> np.ndarray:
        """The weighted sum of the rewards, ``(candidates, prompts · seeds)``, on the same noise for every candidate."""
        candidates = {str(number): Variant(self.genome.items(vector)) for number, vector in enumerate(vectors)}
        easel = Easel(self.pipe, candidates, self.sampling, strict=self.strict)
        weights = [reward.weight for reward in self.rewards]
        sums: dict[tuple[str, int, int], float] = {}
        for jobs, pictures in easel.draw(easel.plan(dict(enumerate(self.prompts)))):
            for job, scores in zip(jobs, score_jobs(self.rewards, jobs, pictures), strict=True):
                sums[job.variant, job.index, job.seed] = sum(w * s for w, s in zip(weights, scores, strict=True))
        noises = [(index, seed) for index in range(len(self.prompts)) for seed in self.sampling.seeds]
        return np.array([[sums[easel.same[name], *noise] for noise in noises] for name in candidates])


def _variants(genome: Genome, start: np.ndarray, best: np.ndarray) -> dict[str, Variant]:
    alone = {entry.label: Variant(stack=[(entry.adapter, 1.0)]) for entry in genome.entries}
    equal = np.full_like(start, start.mean())
    return {
        "base": Variant(),
        **(alone if len(alone) > 1 else {}),
        "equal": Variant(stack=genome.items(equal)),
        **({} if np.allclose(start, equal) else {"start": Variant(stack=genome.items(start))}),
        "tuned": Variant(stack=genome.items(best)),
    }
