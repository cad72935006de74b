"""Streaming score (ours): the policy gradient from one pass over the denoising chain, and one optimiser step.

A step draws ``x' = mean(x, c) + std · n``. The gradient of its log-density at the embedding ``c`` is
``(d mean / d c)ᵀ n / std``, known as soon as ``n`` is drawn: the score is gathered while the picture is drawn, and
multiplied by the advantage once there is one. No chain is stored, no step predicted twice; there is no ratio to clip.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from texforce_hub.train.algorithms.algorithm import Update, draw_chains, slices
from texforce_hub.train.diagnostics import describe_scores
from texforce_hub.train.judge import Judge
from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.policies.rows import Rows, pull
from texforce_hub.train.policies.steps import Steps, grade_steps, slopes

Scores = dict[int, list[Tensor]]
"""By graded step, the gradient of the mean log-probability at every leaf, a row a picture."""


def streaming(policy: Policy, prompts: Sequence[str], judge: Judge, generator: Generator) -> Iterator[Update]:
    """One update: the gradient of minus the advantage-weighted log-probability, averaged over pictures and steps."""
    rows, scores = sample_scored(policy, prompts, judge, generator)
    weights = -judge.advantages() / (policy.config.images * len(scores))
    sums = [torch.stack(leaf).sum(0) for leaf in zip(*scores.values(), strict=True)]
    gradients = [weights.view(-1, *[1] * (total.ndim - 1)) * total for total in sums]
    cotangents = policy.gather(rows.group, gradients, len(prompts))
    number = len(rows.prompt.leaves)
    flat = {k: torch.cat([leaf.flatten(1) for leaf in leaves[:number]], 1) for k, leaves in scores.items()}
    yield Update(cotangents, describe_scores(flat, judge))


def sample_scored(policy: Policy, prompts: Sequence[str], judge: Judge, generator: Generator) -> tuple[Rows, Scores]:
    """Draw pictures for the judge to see; their rows, and what each says about its embeddings."""
    rows, steps = (
        policy.rows(prompts, policy.config.images_per_prompt),
        policy.make_steps(policy.config.inference_steps),
    )
    noise = draw_chains(policy, len(steps.timesteps), generator, judge.team)
    parts = list[Scores]()
    for chosen, some in slices(rows, policy.config.batch_size):
        latents, scores = _sample_slice(policy, some, steps, [n[chosen] for n in noise])
        with torch.no_grad():
            judge.see(policy.decode(latents), [prompts[i] for i in some.group])
        parts.append(scores)
    return rows, {k: [torch.cat(leaf) for leaf in zip(*(part[k] for part in parts), strict=True)] for k in parts[0]}


def _sample_slice(policy: Policy, rows: Rows, steps: Steps, noise: Sequence[Tensor]) -> tuple[Tensor, Scores]:
    """Finished latents and scores; ``noise`` is where the chain begins, and then by step."""
    latents, scores, graded = noise[0], Scores(), grade_steps(steps, policy.config.share)
    for k, fresh in enumerate(noise[1:]):
        with torch.set_grad_enabled(k in graded):
            open_rows, leaves = policy.leaves(rows) if k in graded else (rows, ())
            prediction = policy.predict(latents, steps.timesteps[k], open_rows)
            if k in graded:
                scores[k] = pull(prediction, leaves, fresh * slopes(steps)[k] / latents[0].numel())
        at = torch.full((len(latents),), k, device=latents.device)
        mean, std = steps.step(latents, prediction.detach(), at)
        latents = mean + std * fresh
    return latents, scores
