"""The contract of algorithms: from prompts and a judge to gradients at the prompts' embeddings.

An algorithm draws its pictures, lets the judge see them, and yields what the loss's gradient is *there*; the learner
carries it through the text encoder, takes one optimiser step, and comes back for more. Where several processes train
together, each is given its share of a step's prompts and yields its share of the gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from texforce_hub.train.judge import Judge
from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.policies.rows import Leaves, Rows
from texforce_hub.train.policies.steps import Steps
from texforce_hub.train.team import Team


@dataclass(frozen=True, eq=False)
class Update:
    """The gradient of one optimiser step's loss, and what is worth knowing about it, of all processes.

    Shapes:
        cotangents: of the shapes of ``policy.encode(policy.texts(prompts))``, float32
    """

    cotangents: Leaves
    facts: dict[str, float] = field(default_factory=dict)


Algorithm = Callable[[Policy, Sequence[str], Judge, Generator], Iterator[Update]]


def draw_noise(policy: Policy, count: int, generator: Generator, team: Team) -> list[Tensor]:
    """``count`` times noise for this process's pictures: what they get however many processes there are."""
    prompts, images = team.share(policy.config.prompts_per_step), policy.config.images_per_prompt
    own = slice(prompts.start * images, prompts.stop * images)
    return [policy.draw_noise(policy.config.images, generator)[own] for _ in range(count)]


def draw_chains(policy: Policy, count: int, generator: Generator, team: Team) -> list[Tensor]:
    """Where this process's chains begin, and the noise of their ``count`` steps.

    With ``antithetic`` a prompt's pictures come in pairs that begin alike and get opposite noise. What parts the two is
    that noise alone, so their rewards say which of two opposite directions is the better one.
    """
    start, *steps = draw_noise(policy, 1 + count, generator, team)
    if not policy.config.antithetic:
        return [start, *steps]
    images = policy.config.images_per_prompt
    return [_pair(start, images, 1), *(_pair(noise, images, -1) for noise in steps)]


def _pair(noise: Tensor, images: int, sign: int) -> Tensor:
    """Every second picture of a prompt gets the noise ``(b, …)`` of the one before, times ``sign``."""
    groups = noise.view(-1, images, *noise.shape[1:]).clone()
    groups[:, 1::2] = sign * groups[:, : images // 2 * 2 : 2]
    return groups.view(noise.shape)


def slices(rows: Rows, size: int) -> Iterator[tuple[Tensor, Rows]]:
    """At most ``size`` pictures at a time, as indices and as rows."""
    for chosen in torch.split(torch.arange(len(rows.group), device=rows.group.device), size):
        yield chosen, rows.take(chosen)


@dataclass(frozen=True, eq=False)
class Move:
    """A denoising step taken; all ``(b, c, h, w)`` but the deviation, ``(b, 1, 1, 1)``."""

    mean: Tensor
    std: Tensor
    after: Tensor


def walk(
    policy: Policy, latents: Tensor, rows: Rows, steps: Steps, noise: Sequence[Tensor], which: range
) -> Iterator[Move]:
    """Denoise by steps ``which``; ``noise`` is by step."""
    for k in which:
        at = torch.full((len(latents),), k, device=latents.device)
        prediction = policy.predict(latents, steps.timesteps[k], rows)
        mean, std = steps.step(latents, prediction, at)
        latents = mean + std * noise[k]
        yield Move(mean, std, latents)
