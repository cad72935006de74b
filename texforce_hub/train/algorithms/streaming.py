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
from texforce_hub.train.policies.ddim import Steps, grade_steps, slopes, step_distribution
from texforce_hub.train.policies.policy import Policy, Rows, pull


def streaming(policy: Policy, prompts: Sequence[str], judge: Judge, generator: Generator) -> Iterator[Update]:
    """One update: the gradient of minus the advantage-weighted log-probability, averaged over pictures and steps."""
    config = policy.config
    rows = policy.rows(prompts, config.images_per_prompt)
    latents, scores = sample_scored(policy, rows, generator)
    with torch.no_grad():
        images = policy.decode(latents)
    advantages = judge.advantages(images, [prompts[i] for i in rows.group])
    weights = -advantages.view(-1, 1, 1) / (len(rows.group) * len(scores))
    gradients = [weights * torch.stack(leaf).sum(0) for leaf in zip(*scores.values(), strict=True)]
    cotangents = policy.gather(rows.group, gradients, len(prompts))
    yield Update(cotangents, describe_scores({k: leaves[0] for k, leaves in scores.items()}, judge))


def sample_scored(policy: Policy, rows: Rows, generator: Generator) -> tuple[Tensor, dict[int, list[Tensor]]]:
    """Finished latents ``(b, c, h, w)``, and by graded step what each picture says about its embeddings.

    A score is the gradient of the mean log-probability at every leaf, ``(b, length, width)``.
    """
    config, steps = policy.config, policy.make_steps(policy.config.inference_steps)
    graded = grade_steps(steps, config.eta, config.share)
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
    eta, scores = policy.config.eta, list[Tensor]()
    with torch.set_grad_enabled(graded):
        open_rows, leaves = policy.leaves(rows) if graded else (rows, ())
        prediction = policy.predict(latents, steps.timesteps[k], open_rows)
        if graded:
            slope = slopes(steps, eta)[k] / latents[0].numel()
            scores = pull(prediction, leaves, noise * slope)
    at = torch.full((len(latents),), k, device=latents.device)
    mean, std = step_distribution(latents, prediction.detach(), at, steps, eta)
    return mean + std * noise, scores
