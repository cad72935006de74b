"""PPO as published (arXiv 2311.15657): the chain is stored, and several clipped updates follow a rollout."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from texforce_hub.train.algorithms.algorithm import Update, draw_chains, slices, walk
from texforce_hub.train.judge import Judge
from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.policies.rows import Rows, pull
from texforce_hub.train.policies.steps import Steps, grade_steps, log_probability


def ppo(policy: Policy, prompts: Sequence[str], judge: Judge, generator: Generator) -> Iterator[Update]:
    """``passes`` over the rollout, each shared out over ``updates`` optimiser steps."""
    config = policy.config
    rollout = sample_rollout(policy, prompts, judge, generator)
    advantages = judge.advantages()
    for _ in range(config.passes):
        for share in torch.randperm(config.images, generator=generator).chunk(config.updates):
            pairs = draw_timesteps(share, rollout.graded, config.train_timesteps, generator)
            yield surrogate_gradient(policy, prompts, rollout, advantages, judge, pairs)


@dataclass(frozen=True, eq=False)
class Rollout:
    """Pictures and how they came about; ``b`` pictures, ``s`` denoising steps.

    Shapes:
        latents: ``(b, s + 1, c, h, w)``, first the noise; log_probabilities: ``(b, s)``
    """

    rows: Rows
    latents: Tensor
    log_probabilities: Tensor
    steps: Steps
    graded: list[int]


@torch.no_grad()
def sample_rollout(policy: Policy, prompts: Sequence[str], judge: Judge, generator: Generator) -> Rollout:
    """Draw pictures for the judge to see, and keep every step."""
    config, steps = policy.config, policy.make_steps(policy.config.inference_steps)
    rows = policy.rows(prompts, config.images_per_prompt)
    graded, count = grade_steps(steps, config.share), len(steps.timesteps)
    noise, chains, log_probabilities = draw_chains(policy, count, generator, judge.team), [], []
    for chosen, some in slices(rows, config.batch_size):
        first, *fresh = (n[chosen] for n in noise)
        moves = list(walk(policy, first, some, steps, fresh, range(count)))
        chains.append(torch.stack([first, *(move.after for move in moves)], 1))
        log_probabilities.append(torch.stack([log_probability(m.after, m.mean, m.std) for m in moves], 1))
        judge.see(policy.decode(moves[-1].after), [prompts[i] for i in some.group])
    return Rollout(rows, torch.cat(chains), torch.cat(log_probabilities), steps, graded)


def draw_timesteps(
    rows: Tensor, graded: Sequence[int], count: int | None, generator: Generator
) -> tuple[Tensor, Tensor]:
    """For every picture in ``rows`` a random ``count`` of the graded steps, as pairs ``(pictures, steps)``."""
    count = min(count or len(graded), len(graded))
    chosen = torch.rand(len(rows), len(graded), generator=generator).argsort(1)[:, :count]
    return rows.repeat_interleave(count), torch.tensor(graded)[chosen].flatten()


def ppo_losses(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347, formula 7) as a loss, one value per entry."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def surrogate_gradient(
    policy: Policy,
    prompts: Sequence[str],
    rollout: Rollout,
    advantages: Tensor,
    judge: Judge,
    pairs: tuple[Tensor, Tensor],
) -> Update:
    """The mean surrogate's gradient over pairs ``(n,)`` of picture and step, under the policy as it is now.

    The pairs are those of all processes; each sums over its own.
    """
    # ``clip`` is in nats of the true log-ratio; ours is averaged over the latent's numbers.
    config, clip, device = policy.config, policy.config.clip / rollout.latents[0, 0].numel(), rollout.latents.device
    own = (pairs[0] >= judge.own.start) & (pairs[0] < judge.own.stop)
    rows, at = (pairs[0][own] - judge.own.start).to(device), pairs[1][own].to(device)
    now = policy.rows(prompts, config.images_per_prompt)
    gradients, ratios = list[list[Tensor]](), list[Tensor]()
    for row, k in zip(torch.split(rows, config.batch_size), torch.split(at, config.batch_size), strict=True):
        latents = rollout.latents[row, k]
        with torch.enable_grad():
            open_rows, leaves = policy.leaves(now.take(row))
            if not len(row):
                gradients.append([torch.zeros_like(leaf) for leaf in leaves])
                continue
            output = policy.predict(latents, rollout.steps.timesteps[k], open_rows)
            prediction = output.detach().requires_grad_()
            mean, std = rollout.steps.step(latents, prediction, k)
            log_ratio = log_probability(rollout.latents[row, k + 1], mean, std) - rollout.log_probabilities[row, k]
            loss = ppo_losses(log_ratio, advantages[row], clip).sum() / len(own)
            gradients.append(pull(output, leaves, torch.autograd.grad(loss, prediction)[0]))
        ratios.append(log_ratio.detach())
    whole = [torch.cat(leaf) for leaf in zip(*gradients, strict=True)]
    facts = _describe(torch.cat(ratios or [advantages[:0]]), clip, len(own), judge)
    return Update(policy.gather(now.group[rows], whole, len(prompts)), facts)


def _describe(log_ratio: Tensor, clip: float, pairs: int, judge: Judge) -> dict[str, float]:
    """Share of pairs that are clipped, and Schulman's k3 estimate of the KL from the policy that drew the pictures."""
    k3 = log_ratio.expm1() - log_ratio
    totals = torch.stack([(log_ratio.expm1().abs() > clip).float().sum(), k3.sum()]) / pairs
    judge.team.add([totals])
    return dict(zip(("clipped", "kl_old"), totals.tolist(), strict=True))
