"""One update of the published loop (arXiv 2311.15657), written anew: the yardstick of our training."""

from collections.abc import Sequence

import torch
from torch import Generator

from texforce_hub.train.algorithms.ppo import ppo_losses, sample_rollout
from texforce_hub.train.judge import Judge
from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.policies.rows import Rows, Text
from texforce_hub.train.policies.steps import log_probability

STEPS = 50
"""Denoising steps of a picture; half of them are trained on."""


def published_update(
    policy: Policy,
    prompts: Sequence[str],
    judge: Judge,
    generator: Generator,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Draw ``images_per_prompt`` pictures a prompt, and take one optimiser step on ``share`` of their denoising steps.

    For each of those steps the prompts and the negative prompt are encoded again, and the gradient goes through both
    halves of guidance into the text encoder: what our algorithms save.
    """
    config = policy.config
    rollout = sample_rollout(policy, prompts, judge, generator)
    advantages = judge.advantages()
    clip = config.clip / rollout.latents[0, 0].numel()
    optimizer.zero_grad(set_to_none=True)
    for rows in torch.split(torch.arange(len(advantages), device=advantages.device), config.batch_size):
        for step in rollout.graded:
            latents = rollout.latents[rows, step]
            with torch.enable_grad():
                texts = Text(policy.encode([*prompts, config.negative_prompt]))
                group = rollout.rows.group[rows]
                pairs = Rows(group, texts.take(group), texts.take(torch.full_like(group, len(prompts))))
                prediction = policy.predict(latents, rollout.steps.timesteps[step], pairs)
                at = torch.full_like(rows, step)
                mean, std = rollout.steps.step(latents, prediction, at)
                now = log_probability(rollout.latents[rows, step + 1], mean, std)
                losses = ppo_losses(now - rollout.log_probabilities[rows, step], advantages[rows], clip)
                torch.autograd.backward(losses.sum() / (len(advantages) * len(rollout.graded)))
    optimizer.step()
