"""One optimiser step: the prompt is encoded once, the gradient of all timesteps meets at its embedding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from texforce_hub.errors import TrainingError
from texforce_hub.train.policy import log_probability, ppo_losses, step_distribution, step_divergence
from texforce_hub.train.rollout import Actor, Rollout


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
    actor: Actor, rollout: Rollout, advantages: Tensor, embeddings: Tensor, rows: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of the clipped surrogate (and ``kl`` times the divergence) over pairs of picture and step.

    Shapes:
        advantages: ``(b,)``; embeddings: ``(prompts, length, width)``, with ``uncond="full"`` one more at
        the end, the negative prompt's; rows, at: ``(n,)``. Also returns ``(n, 3)``: was it clipped,
        divergence from the rollout's policy (k3 estimate), divergence from the base (0 without ``kl``).
    """
    config, schedule = actor.config, rollout.schedule
    latents, following = rollout.latents[rows, at], rollout.latents[rows, at + 1]
    conditional = actor.predict(latents, schedule.timesteps[at], embeddings[rollout.group[rows]])
    unconditional = rollout.unconditional[rows, at] if rollout.unconditional is not None else None
    if actor.guided and unconditional is None:
        negative = embeddings[-1:].expand(len(rows), -1, -1)
        unconditional = actor.predict(latents, schedule.timesteps[at], negative)
    mean, std = step_distribution(latents, actor.guide(conditional, unconditional), at, schedule, config.eta)
    log_ratio = log_probability(following, mean, std) - rollout.log_probabilities[rows, at]
    losses = ppo_losses(log_ratio, advantages[rows], config.clip)
    from_base = torch.zeros_like(losses)
    if config.kl:
        from_base = step_divergence(mean, _base_mean(actor, rollout, rows, at, unconditional), std)
        losses = losses + config.kl * from_base
    ratio = log_ratio.detach().exp()
    clipped = ((ratio - 1).abs() > config.clip).float()
    return losses.sum(), torch.stack([clipped, ratio - 1 - log_ratio.detach(), from_base.detach()], 1)


@torch.no_grad()
def _base_mean(actor: Actor, rollout: Rollout, rows: Tensor, at: Tensor, unconditional: Tensor | None) -> Tensor:
    """The step the frozen encoder would take from the same latents; its negative prompt, too, if that is trained."""
    latents, schedule = rollout.latents[rows, at], rollout.schedule
    if actor.guided and actor.config.uncond == "full":
        negative = actor.encode_reference([actor.config.negative_prompt]).expand(len(rows), -1, -1)
        unconditional = actor.predict(latents, schedule.timesteps[at], negative)
    embeddings = actor.encode_reference(rollout.prompts)[rollout.group[rows]]
    prediction = actor.guide(actor.predict(latents, schedule.timesteps[at], embeddings), unconditional)
    return step_distribution(latents, prediction, at, schedule, actor.config.eta)[0]


def accumulate_gradient(actor: Actor, rollout: Rollout, advantages: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """Add the mean loss's gradient to the LoRA's ``.grad``; returns the facts of :func:`policy_loss`.

    The embeddings are cut off from the encoder, every timestep adds its gradient to theirs, and one
    backward pass carries the sum through the encoder: the same gradient as encoding at every timestep.
    """
    texts = list(rollout.prompts)
    if actor.guided and actor.config.uncond == "full":
        texts.append(actor.config.negative_prompt)
    embeddings = actor.encode(texts)
    cut = embeddings.detach().requires_grad_()
    facts, size = [], actor.config.batch
    for some_rows, some_at in zip(torch.split(rows, size), torch.split(at, size), strict=True):
        loss, fact = policy_loss(actor, rollout, advantages, cut, some_rows, some_at)
        torch.autograd.backward(loss / len(rows))
        facts.append(fact)
    torch.autograd.backward(embeddings, cut.grad)
    return torch.cat(facts)


def update_policy(
    actor: Actor,
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
    config, facts, norms = actor.config, [], []
    for _ in range(config.passes):
        for share in torch.randperm(len(rollout.group), generator=generator).chunk(config.updates):
            pairs = draw_timesteps(share, config.trainable_steps, config.train_timesteps, generator)
            rows, at = (p.to(actor.device) for p in pairs)
            optimizer.zero_grad()
            facts.append(accumulate_gradient(actor, rollout, advantages, rows, at))
            norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            if not norm.isfinite():
                raise TrainingError('the gradient is not finite; lower learning_rate, or use dtype = "float32"')
            optimizer.step()
            norms.append(norm)
    clipped, kl_old, kl_base = torch.cat(facts).mean(0).tolist()
    return UpdateFacts(clipped, kl_old, kl_base, torch.stack(norms).mean().item())
