"""Gradients of a differentiable reward straight into the embeddings: few pictures, but easily fooled.

``refl`` (arXiv 2304.05977) stops the chain at a random late step and judges the picture promised there; ``draft_lv``
(arXiv 2309.17400) finishes it, adds the last step's noise anew several times, and judges each; ``truncated`` goes back
through the last ``direct_steps`` steps. Measured on ``shapes``: without the anchor, words that the base knew were lost.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from texforce_hub.errors import ConfigError
from texforce_hub.train.algorithms.algorithm import Update
from texforce_hub.train.judge import Judge
from texforce_hub.train.policies.policy import Policy, Rows, pull
from texforce_hub.train.policies.steps import Steps

_COPIES = 2  # fresh noises of a finished picture, draft_lv


def direct(policy: Policy, prompts: Sequence[str], judge: Judge, generator: Generator) -> Iterator[Update]:
    """One update: the gradient of minus the mean reward.

    Raises:
        ConfigError: a reward has no gradient.
    """
    for reward in judge.rewards:
        if not reward.differentiable:
            raise ConfigError(
                f"reward {reward.name!r} has no gradient; --algorithm direct needs one, streaming does not"
            )
    config = policy.config
    rows = policy.rows(prompts, config.images_per_prompt)
    steps = policy.make_steps(config.inference_steps)
    stop = _choose_stop(config.direct, len(steps.timesteps), config.direct_steps, generator)
    noise = [policy.draw_noise(len(rows.group), generator) for _ in range(len(steps.timesteps) + 1)]
    again = [policy.draw_noise(len(rows.group), generator) for _ in range(_COPIES)]
    parts, scores = [], []
    for chosen in torch.split(torch.arange(len(rows.group), device=rows.group.device), config.batch_size):
        some = rows.take(chosen)
        with torch.no_grad():
            latents = _denoise(policy, noise[0][chosen], some, steps, [n[chosen] for n in noise[1:]], range(stop))
        texts = [prompts[i] for i in some.group]
        parts.append(_climb(policy, latents, some, texts, judge, steps, stop, [n[chosen] for n in (*noise, *again)]))
        scores.append(judge.scores)
    judge.scores = torch.cat(scores, 1)
    gradients = [-torch.cat(leaf) / len(rows.group) for leaf in zip(*parts, strict=True)]
    yield Update(policy.gather(rows.group, gradients, len(prompts)))


def _choose_stop(kind: str, steps: int, depth: int, generator: Generator) -> int:
    """The step from which on there is a graph."""
    if kind == "refl":
        return int(torch.randint(int(0.4 * steps), steps, (), generator=generator))
    return steps if kind == "draft_lv" else max(0, steps - depth)


def _denoise(
    policy: Policy, latents: Tensor, rows: Rows, steps: Steps, noise: Sequence[Tensor], which: range
) -> Tensor:
    for k in which:
        at = torch.full((len(latents),), k, device=latents.device)
        prediction = policy.predict(latents, steps.timesteps[k], rows)
        mean, std = steps.step(latents, prediction, at)
        latents = mean + std * noise[k]
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
    """The reward's gradient at the leaves, through what comes after step ``stop``."""
    last = len(steps.timesteps) - 1
    total: list[Tensor] = []
    scores = []
    for copy in range(_COPIES if policy.config.direct == "draft_lv" else 1):
        with torch.enable_grad():
            open_rows, leaves = policy.leaves(rows)
            start, k = latents, min(stop, last)
            if policy.config.direct == "draft_lv":
                start = steps.add_noise(latents, noise[last + 2 + copy], torch.full_like(rows.group, last))
            if policy.config.direct == "truncated":
                clean = _denoise(policy, start, open_rows, steps, noise[1:], range(stop, last + 1))
            else:
                at = torch.full((len(start),), k, device=start.device)
                clean = steps.predict_clean(start, policy.predict(start, steps.timesteps[k], open_rows), at)
            push = _decode_gradient(policy, clean, texts, judge)
            gradients = pull(clean, leaves, push)
        scores.append(judge.scores)
        total = [a + b for a, b in zip(total, gradients, strict=True)] if total else gradients
    judge.scores = torch.stack(scores).mean(0)
    return [gradient / len(scores) for gradient in total]


def _decode_gradient(policy: Policy, clean: Tensor, texts: Sequence[str], judge: Judge) -> Tensor:
    """The reward's gradient at finished latents."""
    leaf = clean.detach().requires_grad_()
    images = policy.decode(leaf)
    (gradient,) = torch.autograd.grad(images, leaf, judge.ascend(images, texts))
    return gradient
