"""Choose a stack's weights by a reward: CMA-ES on one half of the prompts, reported on the other half.

All candidates of a generation see the same prompts and the same noise, so that their differences are the weights'
(common random numbers). Candidates of text adapters differ in their embeddings only and are drawn in the same batches;
those of U-Net adapters one after the other. The search is Hansen's (arXiv 1604.00772), by the ``cma`` package.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch

from texforce_hub.apply.applied import apply_adapter
from texforce_hub.arguments import check_kind, check_pipeline, check_texts
from texforce_hub.errors import ConfigError, PromptError
from texforce_hub.evaluate.evaluation import Evaluation, Sampling
from texforce_hub.evaluate.variants import Variant, evaluate_variants, quiet
from texforce_hub.families.names import part_of
from texforce_hub.generate.draw import DrawSettings, sample
from texforce_hub.generate.prompts.encode import encode_prompts
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.stack import Item, StackEntry, read_stack
from texforce_hub.rewards.reward import Reward, score_images

Per = Literal["adapter", "part", "block"]
_FEWEST = 4
"""Prompts without which there is nothing to search on and to report on."""
_SMALLEST_STEP = 0.02
"""Below this, in weight, pictures no longer change."""
_LARGEST_SEED, _MOST_SEEDS = 2**31 - 1, 1000


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation of the search: its candidates' mean rewards, best and mean, and how far it steps."""

    best: float
    mean: float
    step: float


@dataclass(frozen=True, eq=False)
class Tuning:
    """Chosen weights, the search that led there, and what they are worth on prompts that it did not see.

    refs: the stack's references with the chosen weights
    evaluation: the variants ``base``, each adapter alone at weight 1, ``equal`` (where the search began) and ``tuned``
    searched: the prompts of the search; the evaluation's own are the others
    """

    refs: tuple[AdapterRef, ...]
    evaluation: Evaluation
    generations: tuple[Generation, ...]
    searched: tuple[str, ...]

    def __str__(self) -> str:
        return " + ".join(map(str, self.refs))


@dataclass(frozen=True, slots=True)
class Genome:
    """The weights of a stack as a vector: one number an adapter, a part or a block, in ``[low, high]``."""

    entries: tuple[StackEntry, ...]
    keys: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, entries: Sequence[StackEntry], per: Per) -> "Genome":
        """The vector of a stack; ``per`` says what has a weight of its own."""
        keys: list[tuple[int, str]] = []
        for index, entry in enumerate(entries):
            names = [""] if per == "adapter" else [_block_of(name, per) for name in entry.adapter.layers]
            keys += [(index, name) for name in dict.fromkeys(names)]
        return cls(tuple(entries), tuple(keys))

    def refs(self, vector: np.ndarray) -> tuple[AdapterRef, ...]:
        """The stack's references at a vector of weights."""
        weights: list[dict[str, float]] = [{} for _ in self.entries]
        for (index, name), value in zip(self.keys, vector, strict=True):
            weights[index][name] = round(float(value), 4)
        return tuple(
            replace(entry.weight, weight=of[""], parts=()) if "" in of else _by_parts(entry.weight, of)
            for entry, of in zip(self.entries, weights)
        )

    def items(self, vector: np.ndarray) -> list[Item]:
        """The stack at a vector of weights, as ``apply_adapter`` takes it."""
        return [(entry.adapter, ref) for entry, ref in zip(self.entries, self.refs(vector))]


def tune_weights(
    pipe: Any,
    adapters: Item | Sequence[Item],
    prompts: Sequence[str],
    rewards: Sequence[Reward],
    *,
    per: Per = "adapter",
    generations: int = 12,
    population: int = 8,
    bounds: tuple[float, float] = (0.0, 1.5),
    sampling: Sampling | None = None,
    seed: int = 0,
    on_generation: Callable[[int, Generation], None] | None = None,
) -> Tuning:
    """Search the weights of a stack that maximise the sum of the rewards, each at its own weight.

    Args:
        pipe: afterwards it is as it was.
        adapters: the stack, as ``apply_adapter`` takes it; its weights are where the search begins.
        prompts: at least four; half of them, chosen by their text, are for the search, the others for the report.
        per: whether an adapter, each of its parts, or each of its blocks has a weight of its own.
        generations, population: how many rounds of how many candidates; the search ends before when its steps are
            below 0.02.
        bounds: of every weight.
        sampling: as in ``evaluate_variants``.
        seed: of the search, from 0 to 2³¹ − 1.

    Raises:
        ConfigError: no rewards, impossible bounds or numbers, a stack that follows a schedule, or ``cma`` is missing.
        PromptError: too few prompts, or some with tags.
        MatchError: a stack that does not fit.

    Example:
        >>> from texforce_hub import load_pipeline, tune_weights
        >>> from texforce_hub.evaluate.evaluation import Sampling
        >>> from texforce_hub.rewards.reward import resolve_reward
        >>> prompts = ["a lime disc", "a red circle", "a blue square", "a green disc"]
        >>> found = tune_weights(
        ...     load_pipeline("shapes", device="cpu"), "shapes-colour", prompts, [resolve_reward("brightness")],
        ...     generations=1, population=4, sampling=Sampling((0,), inference_steps=1),
        ... )
        >>> found.evaluation.variants
        ('base', 'equal', 'tuned')
    """
    check_pipeline(pipe)
    sampling = sampling or Sampling()
    _check(rewards, per, generations, population, bounds)
    if not 0 <= seed <= _LARGEST_SEED:
        raise ConfigError(f"seed {seed}; expected 0 to {_LARGEST_SEED}")
    if not 1 <= len(sampling.seeds) <= _MOST_SEEDS:
        raise ConfigError(f"{len(sampling.seeds)} seeds of every prompt; expected 1 to {_MOST_SEEDS}")
    searched, reported = split_in_half(prompts)
    genome = Genome.of(read_stack(adapters), per)
    start = np.clip([_start(genome, key) for key in genome.keys], *bounds)
    history: list[Generation] = []
    best = start
    for vectors, tell, step in _search(start, bounds, generations, population, seed):
        scores = [float(row.mean()) for row in _score(pipe, genome, vectors, searched, rewards, sampling)]
        best = tell(scores)
        history.append(Generation(max(scores), float(np.mean(scores)), step()))
        if on_generation is not None:
            on_generation(len(history), history[-1])
    variants = _variants(genome, start, best)
    evaluation = evaluate_variants(pipe, variants, reported, rewards, sampling=sampling)
    return Tuning(genome.refs(best), evaluation, tuple(history), tuple(searched))


def split_in_half(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts to search on and prompts to report on, by their text: the same whatever else is in the list.

    Raises:
        PromptError: fewer than four different ones.
    """
    ordered = sorted(dict.fromkeys(check_texts(prompts)), key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    if len(ordered) < _FEWEST:
        raise PromptError(f"{len(ordered)} different prompts; expected at least {_FEWEST}: half of them are held out")
    return ordered[::2], ordered[1::2]


def _check(rewards: Sequence[Reward], per: str, generations: int, population: int, bounds: tuple[float, float]) -> None:
    check_kind(rewards, Sequence, "give a list of what resolve_reward gives")  # type: ignore[type-abstract]
    for reward in rewards:
        check_kind(reward, Reward, "give what resolve_reward gives")
    if not rewards:
        raise ConfigError("nothing to tune for; give at least one reward")
    if per not in get_args(Per):
        raise ConfigError(f"per {per!r}; expected one of {', '.join(get_args(Per))}")
    if generations < 1 or population < 4:
        raise ConfigError(f"{generations} generations of {population}; expected at least one of at least 4 candidates")
    if not bounds[0] < bounds[1] or not all(map(np.isfinite, bounds)):
        raise ConfigError(f"bounds {bounds}; expected two finite numbers, the lower one first")


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


def _score(
    pipe: Any,
    genome: Genome,
    vectors: Sequence[np.ndarray],
    prompts: Sequence[str],
    rewards: Sequence[Reward],
    sampling: Sampling,
) -> np.ndarray:
    """The weighted sum of the rewards, ``(candidates, prompts · seeds)``, on the same noise for every candidate."""
    jobs = [(text, seed * 1_000_003 + index) for index, text in enumerate(prompts) for seed in sampling.seeds]
    weights = torch.tensor([reward.weight for reward in rewards], dtype=torch.float64)

    def judge(images: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        scores = score_images(rewards, images, texts, batch=len(texts)).double().cpu()
        return weights @ scores

    draw = _draw_together if all(_is_text(entry) for entry in genome.entries) else _draw_in_turn
    with quiet(pipe), torch.no_grad():
        values = torch.cat([judge(images, texts) for images, texts in draw(pipe, genome, vectors, jobs, sampling)])
    return values.view(len(vectors), len(jobs)).numpy()


Job = tuple[str, int]
Drawn = tuple[torch.Tensor, list[str]]


def _draw_together(
    pipe: Any, genome: Genome, vectors: Sequence[np.ndarray], jobs: Sequence[Job], sampling: Sampling
) -> Iterator[Drawn]:
    """Pictures of all candidates, each prompt encoded under its candidate's stack, in common batches."""
    stacks = [genome.items(vector) for vector in vectors]
    cells = [(text, seed, stack) for stack in stacks for text, seed in jobs]
    guided = sampling.guidance > 1
    for start in range(0, len(cells), sampling.batch_size):
        texts, seeds, some = zip(*cells[start : start + sampling.batch_size], strict=True)
        how: dict[str, Any] = {"guided": guided, "negative_prompt": sampling.negative_prompt, "prompt_weights": "off"}
        given = encode_prompts(pipe, texts, some, **how)
        yield sample(pipe, _settings(texts, sampling), seeds, given, output_type="pt").float(), list(texts)


def _draw_in_turn(
    pipe: Any, genome: Genome, vectors: Sequence[np.ndarray], jobs: Sequence[Job], sampling: Sampling
) -> Iterator[Drawn]:
    """Pictures of one candidate after the other, the stack staying on the pipeline."""
    with apply_adapter(pipe, genome.items(vectors[0])) as applied:
        for vector in vectors:
            applied.set_weights(genome.refs(vector))
            for start in range(0, len(jobs), sampling.batch_size):
                texts, seeds = zip(*jobs[start : start + sampling.batch_size], strict=True)
                given = {"prompt": list(texts), "negative_prompt": [sampling.negative_prompt] * len(texts)}
                yield sample(pipe, _settings(texts, sampling), seeds, given, output_type="pt").float(), list(texts)


def _settings(texts: Sequence[str], sampling: Sampling) -> DrawSettings:
    return DrawSettings(tuple(texts), inference_steps=sampling.inference_steps, guidance=sampling.guidance)


def _variants(genome: Genome, start: np.ndarray, best: np.ndarray) -> dict[str, Variant]:
    alone = {entry.label: Variant(stack=[(entry.adapter, 1.0)]) for entry in genome.entries}
    return {
        "base": Variant(),
        **(alone if len(alone) > 1 else {}),
        "equal": Variant(stack=genome.items(start)),
        "tuned": Variant(stack=genome.items(best)),
    }


def _start(genome: Genome, key: tuple[int, str]) -> float:
    index, name = key
    entry = genome.entries[index]
    layer = next(layer for layer in entry.adapter.layers if not name or layer.startswith(f"{name}.") or layer == name)
    return entry.weight.weight_of(layer)


def _by_parts(ref: AdapterRef, weights: dict[str, float]) -> AdapterRef:
    return replace(ref, weight=1.0, parts=tuple(weights.items()))


def _is_text(entry: StackEntry) -> bool:
    return all(part.startswith("text_encoder") for part in entry.adapter.parts)


def _block_of(layer: str, per: Per) -> str:
    """The part or the block of a layer, as a reference's weights name it."""
    part = part_of(layer)
    if per == "part":
        return part
    pieces = layer.split(".")
    numbered = next((i for i, piece in enumerate(pieces) if piece.isdigit()), 1)
    return ".".join(pieces[: numbered + 1])
