"""Pictures by a policy without noise on the way, as its pipeline's ordinary call draws them."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.policies.rows import in_slices


@torch.no_grad()
def sample_images(
    policy: Policy,
    prompts: Sequence[str],
    *,
    images: int,
    steps: int,
    seed: int,
    share: slice = slice(None),
) -> Tensor:
    """``images`` pictures of every prompt by deterministic steps, ``(len(prompts) · images, 3, h, w)`` in [0, 1].

    The same seed gives the same starting noise, so that two policies can be compared picture by picture. With
    ``share`` only the pictures of those prompts are drawn, from the noise that they have among all.
    """
    chain, rows = policy.make_steps(steps, noisy=False), policy.rows(prompts[share], images)
    noise = policy.draw_noise(len(prompts) * images, Generator().manual_seed(seed))
    latents = noise.view(len(prompts), images, *noise.shape[1:])[share].flatten(0, 1)
    for k, timestep in enumerate(chain.timesteps):

        def move(some: Tensor, index: Tensor, k: int = k, timestep: Tensor = timestep) -> Tensor:
            prediction = policy.predict(some, timestep, rows.take(index))
            return chain.step(some, prediction, torch.full_like(index, k))[0]

        index = torch.arange(len(latents), device=latents.device)
        latents = in_slices(move, policy.config.batch_size, latents, index)
    return policy.decode(latents)
