"""PPO as published (arXiv 2311.15657): the chain is stored, and several clipped updates follow a rollout."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from texforce_hub.train.algorithms.algorithm import Update
from texforce_hub.train.judge import Judge
from texforce_hub.train.policies.policy import Policy, Rows, in_slices, pull
from texforce_hub.train.policies.steps import Steps, grade_steps, log_probability


def ppo(policy: Policy, prompts: Sequence[str], judge: Judge, generator: Generator) -> Iterator[Update]:
    """``passes`` over the rollout, each shared out over ``updates`` optimiser steps."""
    config = policy.config
    rollout = sample_rollout(policy, policy.rows(prompts, config.images_per_prompt), generator)
    advantages = judge.advantages(rollout.images, [prompts[i] for i in rollout.rows.group])
    for _ in range(config.passes):
        for share in torch.randperm(len(advantages), generator=generator).chunk(config.updates):
            rows, at = draw_timesteps(share, rollout.graded, config.train_timesteps, generator)
            device = advantages.device
            yield surrogate_gradient(policy, prompts, rollout, advantages, rows.to(device), at.to(device))


@dataclass(frozen=True, eq=False)
class Rollout:
    """Pictures and how they came about; ``b`` pictures, ``s`` denoising steps.

    Shapes:
        latents: ``(b, s + 1, c, h, w)``, first the noise; log_probabilities: ``(b, s)``; images: ``(b, 3, h, w)``
    """

    rows: Rows
    latents: Tensor
    log_probabilities: Tensor
    images: Tensor
    steps: Steps
    graded: list[int]


@torch.no_grad()
def sample_rollout(policy: Policy, rows: Rows, generator: Generator) -> Rollout:
    """Draw pictures and keep every step."""
    config, steps = policy.config, policy.make_steps(policy.config.inference_steps)
    graded = grade_steps(steps, config.share)
    chain, log_probabilities = [policy.draw_noise(len(rows.group), generator)], []
    index = torch.arange(len(rows.group), device=rows.group.device)
    for k, timestep in enumerate(steps.timesteps):

        def predict(some: Tensor, chosen: Tensor, timestep: Tensor = timestep) -> Tensor:
            return policy.predict(some, timestep, rows.take(chosen))

        before, noise = chain[-1], policy.draw_noise(len(index), generator)
        prediction = in_slices(predict, config.batch_size, before, index)
        mean, std = steps.step(before, prediction, torch.full_like(index, k))
        chain.append(mean + std * noise)
        log_probabilities.append(log_probability(chain[-1], mean, std))
    images = policy.decode(chain[-1])
    return Rollout(rows, torch.stack(chain, 1), torch.stack(log_probabilities, 1), images, steps, graded)


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
    policy: Policy, prompts: Sequence[str], rollout: Rollout, advantages: Tensor, rows: Tensor, at: Tensor
) -> Update:
    """The mean surrogate's gradient over pairs ``(n,)`` of picture and step, under the policy as it is now."""
    # ``clip`` is in nats of the true log-ratio; ours is averaged over the latent's numbers.
    config, clip = policy.config, policy.config.clip / rollout.latents[0, 0].numel()
    now = policy.rows(prompts, config.images_per_prompt)
    gradients, ratios = list[list[Tensor]](), list[Tensor]()
    for row, k in zip(torch.split(rows, config.batch_size), torch.split(at, config.batch_size), strict=True):
        latents = rollout.latents[row, k]
        with torch.enable_grad():
            open_rows, leaves = policy.leaves(now.take(row))
            output = policy.predict(latents, rollout.steps.timesteps[k], open_rows)
            prediction = output.detach().requires_grad_()
            mean, std = rollout.steps.step(latents, prediction, k)
            log_ratio = log_probability(rollout.latents[row, k + 1], mean, std) - rollout.log_probabilities[row, k]
            (push,) = torch.autograd.grad(ppo_losses(log_ratio, advantages[row], clip).sum() / len(rows), prediction)
            gradients.append(pull(output, leaves, push))
        ratios.append(log_ratio.detach())
    log_ratio = torch.cat(ratios)
    facts = {"clipped": (log_ratio.expm1().abs() > clip).float().mean().item()}
    facts["kl_old"] = (log_ratio.expm1() - log_ratio).mean().item()  # Schulman's k3
    whole = [torch.cat(leaf) for leaf in zip(*gradients, strict=True)]
    return Update(policy.gather(now.group[rows], whole, len(prompts)), facts)
