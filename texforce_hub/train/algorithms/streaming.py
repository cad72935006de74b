"""Streaming score (ours): the policy gradient from one pass over the denoising chain, and one optimiser step.

A step draws ``x' = mean(x, c) + std · n``. The gradient of its log-density at the embedding ``c`` is
``(d mean / d c)ᵀ n / std``, known as soon as ``n`` is drawn: the score is gathered while the picture is drawn, and
multiplied by the advantage once there is one. No chain is stored, no step predicted twice; there is no ratio to clip.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from texforce_hub.train.algorithms.algorithm import Update
from texforce_hub.train.diagnostics import describe_scores
from texforce_hub.train.judge import Judge
from texforce_hub.train.policies.policy import Policy, Rows, pull
from texforce_hub.train.policies.steps import Steps, grade_steps, slopes


def streaming(policy: Policy, prompts: Sequence[str], judge: Judge, generator: Generator) -> Iterator[Update]:
    """One update: the gradient of minus the advantage-weighted log-probability, averaged over pictures and steps."""
    config = policy.config
    rows = policy.rows(prompts, config.images_per_prompt)
    latents, scores = sample_scored(policy, rows, generator)
    with torch.no_grad():
        images = policy.decode(latents)
    advantages = judge.advantages(images, [prompts[i] for i in rows.group])
    weights = -advantages / (len(rows.group) * len(scores))
    sums = [torch.stack(leaf).sum(0) for leaf in zip(*scores.values(), strict=True)]
    gradients = [weights.view(-1, *[1] * (total.ndim - 1)) * total for total in sums]
    cotangents = policy.gather(rows.group, gradients, len(prompts))
    number = len(rows.prompt.leaves)
    flat = {k: torch.cat([leaf.flatten(1) for leaf in leaves[:number]], 1) for k, leaves in scores.items()}
    yield Update(cotangents, describe_scores(flat, judge))


def sample_scored(policy: Policy, rows: Rows, generator: Generator) -> tuple[Tensor, dict[int, list[Tensor]]]:
    """Finished latents ``(b, c, h, w)``, and by graded step what each picture says about its embeddings.

    A score is the gradient of the mean log-probability at every leaf, a row a picture.
    """
    config, steps = policy.config, policy.make_steps(policy.config.inference_steps)
    graded = grade_steps(steps, config.share)
    latents, scores = policy.draw_noise(len(rows.group), generator), dict[int, list[Tensor]]()
    for k in range(len(steps.timesteps)):
        noise = policy.draw_noise(len(rows.group), generator)
        parts = [
            _advance(policy, latents[chosen], noise[chosen], rows.take(chosen), steps, k, k in graded)
            for chosen in torch.split(torch.arange(len(latents), device=latents.device), config.batch_size)
        ]
        latents = torch.cat([after for after, _ in parts])
        if k in graded:
            scores[k] = [torch.cat(leaf) for leaf in zip(*(score for _, score in parts), strict=True)]
    return latents, scores


def _advance(
    policy: Policy,
    latents: Tensor,
    noise: Tensor,
    rows: Rows,
    steps: Steps,
    k: int,
    graded: bool,  # noqa: FBT001
) -> tuple[Tensor, list[Tensor]]:
    """The latents after step ``k``, and the step's score if it is graded."""
    scores = list[Tensor]()
    with torch.set_grad_enabled(graded):
        open_rows, leaves = policy.leaves(rows) if graded else (rows, ())
        prediction = policy.predict(latents, steps.timesteps[k], open_rows)
        if graded:
            slope = slopes(steps)[k] / latents[0].numel()
            scores = pull(prediction, leaves, noise * slope)
    at = torch.full((len(latents),), k, device=latents.device)
    mean, std = steps.step(latents, prediction.detach(), at)
    return mean + std * noise, scores
