"""Gradients of a differentiable reward straight into the embeddings: few pictures, but easily fooled.

``refl`` (arXiv 2304.05977) stops the chain at a random late step and judges the picture promised there; ``draft_lv``
(arXiv 2309.17400) finishes it, adds the last step's noise anew several times, and judges each; ``truncated`` goes back
through the last ``direct_steps`` steps. Measured on ``shapes``: without the anchor, words that the base knew were lost.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from texforce_hub.errors import ConfigError
from texforce_hub.rewards.reward import Reward
from texforce_hub.train.algorithms.algorithm import Update, draw_noise, slices, walk
from texforce_hub.train.judge import Judge
from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.policies.rows import Rows, pull
from texforce_hub.train.policies.steps import Steps

_COPIES = 2  # fresh noises of a finished picture, draft_lv


def direct(policy: Policy, prompts: Sequence[str], judge: Judge, generator: Generator) -> Iterator[Update]:
    """One update: the gradient of minus the mean reward."""
    config = policy.config
    rows = policy.rows(prompts, config.images_per_prompt)
    steps = policy.make_steps(config.inference_steps)
    count = len(steps.timesteps)
    stop = _choose_stop(config.direct, count, config.direct_steps, generator)
    noise = draw_noise(policy, 1 + count + _COPIES, generator, judge.team)
    gradients = list[list[Tensor]]()
    for chosen, some in slices(rows, config.batch_size):
        first, *fresh = (n[chosen] for n in noise)
        with torch.no_grad():
            latents = _denoise(policy, first, some, steps, fresh, range(stop))
        texts = [prompts[i] for i in some.group]
        gradients.append(_climb(policy, latents, some, texts, judge, steps, stop, fresh))
    judge.close()
    whole = [-torch.cat(leaf) / config.images for leaf in zip(*gradients, strict=True)]
    yield Update(policy.gather(rows.group, whole, len(prompts)))


def require_gradients(rewards: Sequence[Reward]) -> None:
    """Refuse rewards that nothing can be pushed back through.

    Raises:
        ConfigError: there is one.
    """
    for reward in rewards:
        if not reward.differentiable:
            raise ConfigError(
                f"reward {reward.name!r} has no gradient; --algorithm direct needs one, streaming does not"
            )


def _choose_stop(kind: str, steps: int, depth: int, generator: Generator) -> int:
    """The step from which on there is a graph."""
    if kind == "refl":
        return int(torch.randint(int(0.4 * steps), steps, (), generator=generator))
    return steps if kind == "draft_lv" else max(0, steps - depth)


def _denoise(
    policy: Policy, latents: Tensor, rows: Rows, steps: Steps, noise: Sequence[Tensor], which: range
) -> Tensor:
    for move in walk(policy, latents, rows, steps, noise, which):
        latents = move.after
    return latents


def _climb(
    policy: Policy,
    latents: Tensor,
    rows: Rows,
    texts: Sequence[str],
    judge: Judge,
    steps: Steps,
    stop: int,
    noise: Sequence[Tensor],
) -> list[Tensor]:
    """The reward's gradient at the leaves, through what comes after step ``stop``; ``noise`` by step, then copies'."""
    count, kind = len(steps.timesteps), policy.config.direct
    gradients, scores = list[list[Tensor]](), list[Tensor]()
    for again in noise[count:] if kind == "draft_lv" else [None]:
        with torch.enable_grad():
            open_rows, leaves = policy.leaves(rows)
            start = latents
            if again is not None:
                start = steps.add_noise(latents, again, torch.full_like(rows.group, count - 1))
            if kind == "truncated":
                clean = _denoise(policy, start, open_rows, steps, noise, range(stop, count))
            else:
                k = min(stop, count - 1)
                at = torch.full((len(start),), k, device=start.device)
                clean = steps.predict_clean(start, policy.predict(start, steps.timesteps[k], open_rows), at)
            slope, score = _ascend(policy, clean, texts, judge)
            gradients.append(pull(clean, leaves, slope))
        scores.append(score)
    judge.note(torch.stack(scores).mean(0))
    return [torch.stack(leaf).sum(0) / len(scores) for leaf in zip(*gradients, strict=True)]


def _ascend(policy: Policy, clean: Tensor, texts: Sequence[str], judge: Judge) -> tuple[Tensor, Tensor]:
    """The reward's gradient at finished latents, and the scores."""
    leaf = clean.detach().requires_grad_()
    images = policy.decode(leaf)
    slope, scores = judge.ascend(images, texts)
    (gradient,) = torch.autograd.grad(images, leaf, slope)
    return gradient, scores
