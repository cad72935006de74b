"""PPO as published: group advantages, the clipped surrogate, one optimiser step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from texforce_hub.errors import TrainingError
from texforce_hub.train.policies.ddim import log_probability, step_distribution, step_divergence
from texforce_hub.train.policies.rollout import Rollout
from texforce_hub.train.policies.stable_diffusion import Policy


def group_advantages(rewards: Tensor, *, floor: float, clip: float) -> Tensor:
    """How much better than its group a picture is, in the group's standard deviations.

    Shapes:
        rewards: ``(prompts, images)``; the result has the same shape, in [-clip, clip]. A group of equal
        rewards gives exactly 0.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = torch.where(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0, centred)
    return (centred / (rewards.std(1, keepdim=True) + floor).clamp(min=1e-12)).clamp(-clip, clip)


def ppo_losses(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347, formula 7) as a loss, one value per entry."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


@dataclass(frozen=True)
class UpdateFacts:
    """What an update did: means over its pictures and timesteps, and the gradient's norm before scaling."""

    clipped: float
    kl_old: float
    kl_base: float
    grad_norm: float


def draw_timesteps(rows: Tensor, trainable: int, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """For every picture in ``rows`` a random subset of its steps, as pairs ``(pictures, steps)`` of equal length."""
    count = min(count, trainable)
    chosen = torch.rand(len(rows), trainable, generator=generator).argsort(1)[:, :count]
    return rows.repeat_interleave(count), chosen.flatten()


def policy_loss(
    policy: Policy, rollout: Rollout, advantages: Tensor, embeddings: Tensor, rows: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of the clipped surrogate (and ``kl`` times the divergence) over pairs of picture and step.

    Shapes:
        advantages: ``(b,)``; embeddings: ``(prompts, length, width)``, with ``uncond="full"`` one more at
        the end, the negative prompt's; rows, at: ``(n,)``. Also returns ``(n, 3)``: was it clipped,
        divergence from the rollout's policy (k3 estimate), divergence from the base (0 without ``kl``).
    """
    config = policy.config
    mean, std = _distribution(policy, rollout, embeddings, rows, at)
    log_ratio = log_probability(rollout.latents[rows, at + 1], mean, std) - rollout.log_probabilities[rows, at]
    losses = ppo_losses(log_ratio, advantages[rows], config.clip)
    from_base = torch.zeros_like(losses)
    if config.kl:
        with torch.no_grad():
            reference, _ = _distribution(policy, rollout, policy.reference.encode(_texts(policy, rollout)), rows, at)
        from_base = step_divergence(mean, reference, std)
        losses = losses + config.kl * from_base
    ratio = log_ratio.detach().exp()
    clipped = ((ratio - 1).abs() > config.clip).float()
    return losses.sum(), torch.stack([clipped, ratio - 1 - log_ratio.detach(), from_base.detach()], 1)


def _texts(policy: Policy, rollout: Rollout) -> list[str]:
    """What has to be encoded: the prompts, and the negative one if it is trained, too."""
    return [*rollout.prompts, *([policy.config.negative_prompt] if policy.trains_negative else [])]


def _distribution(
    policy: Policy, rollout: Rollout, embeddings: Tensor, rows: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the rollout's steps ``at`` of its pictures ``rows`` under the embeddings of its texts."""
    latents, timesteps = rollout.latents[rows, at], rollout.steps.timesteps[at]
    conditional = policy.predict(latents, timesteps, embeddings[rollout.group[rows]])
    unconditional = rollout.unconditional[rows, at] if rollout.unconditional is not None else None
    if policy.trains_negative:
        unconditional = policy.predict(latents, timesteps, embeddings[-1:].expand(len(rows), -1, -1))
    return step_distribution(latents, policy.guide(conditional, unconditional), at, rollout.steps, policy.config.eta)


def accumulate_gradient(policy: Policy, rollout: Rollout, advantages: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """Add the mean loss's gradient to the LoRA's ``.grad``; returns the facts of :func:`policy_loss`.

    The embeddings are cut off from the encoder, every timestep adds its gradient to theirs, and one
    backward pass carries the sum through the encoder: the same gradient as encoding at every timestep.
    """
    embeddings = policy.encode(_texts(policy, rollout))
    cut = embeddings.detach().requires_grad_()
    facts, size = [], policy.config.batch_size
    for some_rows, some_at in zip(torch.split(rows, size), torch.split(at, size), strict=True):
        loss, fact = policy_loss(policy, rollout, advantages, cut, some_rows, some_at)
        torch.autograd.backward(loss / len(rows))
        facts.append(fact)
    torch.autograd.backward(embeddings, cut.grad)
    return torch.cat(facts)


def update_policy(
    policy: Policy,
    rollout: Rollout,
    advantages: Tensor,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    generator: Generator,
) -> UpdateFacts:
    """All updates of a step: ``passes`` over the rollout, each shared out over ``updates`` optimiser steps.

    Raises:
        TrainingError: the gradient is not finite; the parameters are then as before this optimiser step.
    """
    config, facts, norms = policy.config, [], []
    for _ in range(config.passes):
        for share in torch.randperm(len(rollout.group), generator=generator).chunk(config.updates):
            pairs = draw_timesteps(share, config.trainable_steps, config.train_timesteps, generator)
            rows, at = (p.to(policy.device) for p in pairs)
            optimizer.zero_grad()
            facts.append(accumulate_gradient(policy, rollout, advantages, rows, at))
            norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            if not norm.isfinite():
                raise TrainingError('the gradient is not finite; lower learning_rate, or use dtype = "float32"')
            optimizer.step()
            norms.append(norm)
    clipped, kl_old, kl_base = torch.cat(facts).mean(0).tolist()
    return UpdateFacts(clipped, kl_old, kl_base, torch.stack(norms).mean().item())
