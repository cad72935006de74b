"""Stable Diffusion 1.x and 2.x, SD-Turbo: one text encoder, whose last states the U-Net reads."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from texforce_hub.train.policies.ddim import DDIMSteps, make_ddim_steps
from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.policies.rows import Leaves, Text


@dataclass(frozen=True, eq=False)
class StableDiffusion(Policy):
    """Leaves: the states ``(n, length, width)``."""

    def make_steps(self, count: int, *, noisy: bool = True) -> DDIMSteps:
        """DDIM's; ``eta`` is 1 unless the settings say otherwise."""
        return make_ddim_steps(self.scheduler, count, self.eta(noisy=noisy), self.device)

    def encode(self, texts: Sequence[str]) -> Leaves:
        """The states."""
        return (self.read_clip("text_encoder", texts)[0].float(),)

    def call_network(self, latents: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        """The U-Net's prediction."""
        kind, (states,) = self.network.dtype, text.leaves
        output: Tensor = self.network(latents.to(kind), timesteps, encoder_hidden_states=states.to(kind)).sample
        return output

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """As the U-Net takes them."""
        side = self.count_latents(self.network.config.sample_size)
        return self.network.config.in_channels, side, side
