"""Which stack is better, and by how much: the same prompts and the same noise for all, intervals over prompts.

Prompts are what varies and what one wants to speak about, so the bootstrap resamples prompts, each with all its
pictures.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from texforce_hub.arguments import Pipeline, check_kind, check_pipeline, check_texts
from texforce_hub.errors import ConfigError, PromptError
from texforce_hub.evaluate.diversity import shrink
from texforce_hub.evaluate.drawing import Easel, Job, Variant
from texforce_hub.evaluate.evaluation import Evaluation, Sampling
from texforce_hub.evaluate.tally import Tally
from texforce_hub.generate.images.sheet import as_picture
from texforce_hub.generate.log import saying_once
from texforce_hub.generate.prompts.emphasis import Emphasis
from texforce_hub.generate.prompts.sets import refuse_markup
from texforce_hub.generate.prompts.weighting import say_cut
from texforce_hub.rewards.reward import Reward, score_images

OnImages = Callable[[str, int], None]


def evaluate_variants(
    pipe: Pipeline,
    variants: Mapping[str, Variant],
    prompts: Sequence[str],
    rewards: Sequence[Reward],
    *,
    sampling: Sampling | None = None,
    strict: bool = True,
    on_images: OnImages | None = None,
) -> Evaluation:
    """Draw every prompt at every seed under every variant, and score the pictures.

    Variants share batches as far as that is exact; two that are the same arithmetic share their pictures, and differ by
    exactly 0. The pipeline is afterwards as it was.

    Args:
        variants: by name; the first is what the others are compared with.
        prompts: each different from the others.
        strict: as in ``apply_adapter``.
        on_images: called after every batch, for each variant with the number of its pictures in it.

    Raises:
        ConfigError: no variant, no reward or no seed, or something that is none.
        PromptError: no prompt, one twice, or one with tags or weights.
        MatchError: a stack does not fit.
        RewardError: a reward cannot be used.

    Example:
        >>> from texforce_hub import Sampling, Variant, evaluate_variants, load_pipeline
        >>> from texforce_hub.rewards.reward import resolve_reward
        >>> variants = {"base": Variant(), "colour": Variant(stack="shapes-colour")}
        >>> result = evaluate_variants(
        ...     load_pipeline("shapes", device="cpu"), variants, ["a lime disc", "a red circle"],
        ...     [resolve_reward("alignment")], sampling=Sampling((0,), inference_steps=2),
        ... )
        >>> result.variants
        ('base', 'colour')
    """
    sampling = sampling or Sampling()
    check_pipeline(pipe)
    _check_variants(variants)
    check_rewards(rewards)
    prompts = check_prompts(prompts)
    check_kind(sampling, Sampling, "give Sampling(seeds, …)").check()
    easel = Easel(pipe, variants, sampling, strict=strict)
    tally = Tally(easel.same, prompts, [reward.name for reward in rewards], sampling)
    with saying_once():
        say_cut_prompts(pipe, (*prompts, sampling.negative_prompt))
        for jobs, pictures in easel.draw(easel.plan(dict(enumerate(prompts)))):
            for job, scores, picture in zip(jobs, score_jobs(rewards, jobs, pictures), pictures, strict=True):
                tally.note(job, scores, shrink(as_picture(picture)))
            report_images(easel.same, jobs, on_images)
    return tally.evaluation()


def score_jobs(rewards: Sequence[Reward], jobs: Sequence[Job], pictures: Tensor) -> list[list[float]]:
    """Of each picture its scores, one a reward.

    Raises:
        RewardError: a reward cannot be used.
    """
    scores = score_images(rewards, pictures, [job.prompt for job in jobs], batch=len(jobs))
    rows: list[list[float]] = scores.double().cpu().T.tolist()
    return rows


def report_images(same: Mapping[str, str], jobs: Sequence[Job], on_images: OnImages | None) -> None:
    """Say how many pictures of each variant are there now, of those too that share them."""
    counts = Counter(job.variant for job in jobs)
    for name, other in same.items() if on_images is not None else ():
        if other in counts and on_images is not None:
            on_images(name, counts[other])


def say_cut_prompts(pipe: Any, texts: Sequence[str]) -> None:
    """Say which prompts the text encoder cuts."""
    read = [Emphasis(((text, 1.0),)) for text in texts if text]
    say_cut(pipe, read, way_out="the reward is asked about all of it")


def check_prompts(prompts: Any) -> tuple[str, ...]:
    """The prompts, which can be evaluated on.

    Raises:
        ConfigError: no list of texts.
        PromptError: an empty list or prompt, a prompt twice, or one with tags or weights.
    """
    texts = check_texts(prompts)
    if not texts:
        raise PromptError("no prompt to evaluate on; give at least one")
    if not all(text.strip() for text in texts):
        raise PromptError("an empty prompt among those to evaluate on; expected at least one word in each")
    if twice := [prompt for prompt, count in Counter(texts).items() if count > 1]:
        raise PromptError(f"{twice[0]!r} is there twice: it would count as two prompts; give it once, and more seeds")
    refuse_markup(texts)
    return texts


def check_rewards(rewards: Any) -> None:
    """Refuse what are no rewards.

    Raises:
        ConfigError: no list of them, an empty one, something else in it, or one name twice.
    """
    example = "resolve_rewards(['alignment'])"
    if isinstance(rewards, str | Reward) or not isinstance(rewards, Sequence) or not rewards:
        raise ConfigError(f"rewards is {_named(rewards)}; expected a list of at least one, as {example} gives it")
    if wrong := [reward for reward in rewards if not isinstance(reward, Reward)]:
        raise ConfigError(f"{wrong[0]!r:.80} is no reward; expected what {example} gives")
    if twice := [name for name, count in Counter(reward.name for reward in rewards).items() if count > 1]:
        raise ConfigError(f"two rewards have the name {twice[0]!r}; give each another")


def _check_variants(variants: Any) -> None:
    example = "{'base': Variant(), 'mine': Variant('REF')}"
    if not isinstance(variants, Mapping) or not variants:
        raise ConfigError(f"variants is {_named(variants)}; expected names with at least one variant, e.g. {example}")
    for name, variant in variants.items():
        if not isinstance(name, str) or not isinstance(variant, Variant):
            raise ConfigError(f"variant {name!r:.80} is {_named(variant)}; expected e.g. {example}")


def _named(value: Any) -> str:
    """``[]``, ``a str``: what a wrong value is, in a word."""
    empty = isinstance(value, Sequence | Mapping) and not value
    return repr(value) if empty else f"a {type(value).__name__}"
