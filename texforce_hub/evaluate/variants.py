"""Which stack is better, and by how much: the same prompts and the same noise for all, intervals over prompts.

Pictures come from the pipeline's ordinary call, so a figure holds wherever the pipeline runs. Prompts are
what varies and what one wants to speak about, so the bootstrap resamples prompts, each with all its pictures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from texforce_hub.apply.applied import apply_adapter
from texforce_hub.arguments import check_kind, check_pipeline, check_texts
from texforce_hub.errors import ConfigError, PromptError
from texforce_hub.evaluate.evaluation import Evaluation, Sampling
from texforce_hub.generate.draw import DrawSettings, sample
from texforce_hub.generate.prompts.emphasis import Emphasis
from texforce_hub.generate.prompts.sets import refuse_markup
from texforce_hub.generate.prompts.weighting import say_cut
from texforce_hub.rewards.reward import Reward, score_images


@dataclass(frozen=True)
class Variant:
    """What to evaluate: a stack (anything ``apply_adapter`` takes), a U-Net in place of the pipeline's, or both."""

    stack: Any = ()
    unet: Any = None


def evaluate_variants(
    pipe: Any,
    variants: Mapping[str, Variant],
    prompts: Sequence[str],
    rewards: Sequence[Reward],
    *,
    sampling: Sampling | None = None,
    on_images: Callable[[str, int], None] | None = None,
) -> Evaluation:
    """Draw every prompt at every seed under every variant, and score the pictures.

    The pipeline is afterwards as it was. ``on_images(variant, count)`` is called after every batch.

    Raises:
        ConfigError: no variant, no reward or no seed.
        PromptError: no prompt, or one with tags or weights.
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
    prompts = check_texts(prompts)
    check_kind(variants, Mapping, "give a mapping of names to Variant(stack=...)")  # type: ignore[type-abstract]
    check_kind(rewards, Sequence, "give a list of what resolve_reward gives")  # type: ignore[type-abstract]
    for variant in variants.values():
        check_kind(variant, Variant, "give Variant(stack=...)")
    for reward in rewards:
        check_kind(reward, Reward, "give what resolve_reward gives")
    if not variants or not rewards or not sampling.seeds:
        raise ConfigError("nothing to evaluate: it takes at least one variant, one reward and one seed")
    if not prompts:
        raise PromptError("no prompt to evaluate on; give at least one")
    refuse_markup(prompts)
    texts = [text for text in (*prompts, sampling.negative_prompt) if text]
    say_cut(pipe, [Emphasis(((text, 1.0),)) for text in texts], way_out="the reward is asked about all of it")
    scores: dict[str, dict[str, np.ndarray]] = {reward.name: {} for reward in rewards}
    for name, variant in variants.items():
        with in_place(pipe, variant):
            parts = []
            for texts, images in draw_images(pipe, prompts, sampling):
                parts.append(score_images(rewards, images, texts, batch=len(texts)).cpu())
                if on_images is not None:
                    on_images(name, len(texts))
        for reward, row in zip(rewards, torch.cat(parts, 1), strict=True):
            scores[reward.name][name] = row.view(len(prompts), -1).double().numpy()
    return Evaluation(tuple(prompts), sampling, scores)


def draw_images(
    pipe: Any, prompts: Sequence[str], sampling: Sampling, *, numbers: Sequence[int] | None = None
) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of prompts and their pictures ``(b, 3, h, w)`` in [0, 1]: prompt by prompt, each at every seed.

    Each picture's noise comes from a generator of its own, seeded by the prompt's index and the seed, on the
    CPU: it depends neither on the batch nor on the device. ``numbers``: the prompts' indices among those that were
    drawn before, so that some of them are drawn again just so.
    """
    jobs = [
        (text, seed * 1_000_003 + index)
        for index, text in zip(numbers or range(len(prompts)), prompts)
        for seed in sampling.seeds
    ]
    settings = DrawSettings(
        tuple(prompts) or ("",), inference_steps=sampling.inference_steps, guidance=sampling.guidance
    )
    with quiet(pipe), torch.no_grad():
        for start in range(0, len(jobs), sampling.batch_size):
            texts, seeds = zip(*jobs[start : start + sampling.batch_size], strict=True)
            given = {"prompt": list(texts), "negative_prompt": [sampling.negative_prompt] * len(texts)}
            yield list(texts), sample(pipe, settings, seeds, given, output_type="pt").float()


@contextmanager
def in_place(pipe: Any, variant: Variant) -> Iterator[None]:
    """The pipeline with a variant put on it, and afterwards as it was."""
    before = pipe.unet
    if variant.unet is not None:
        pipe.unet = variant.unet
    try:
        with apply_adapter(pipe, variant.stack) if variant.stack else nullcontext():
            yield
    finally:
        pipe.unet = before


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """No progress bar from the pipeline, and afterwards what it had."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
