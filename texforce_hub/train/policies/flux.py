"""Flux: CLIP's pooled output learns; T5's states, which carry the sentence, stay as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from texforce_hub.errors import ConfigError
from texforce_hub.train.policies.flow import FlowSteps, make_flow_steps
from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.policies.rows import Leaves, Text
from texforce_hub.train.policies.sd3 import NOISE_LEVEL, read_t5

_T5_TOKENS = 512  # as the pipeline does
_SIDE = 128  # of the latents, where no resolution is given; as the pipeline does


@dataclass(frozen=True, eq=False)
class Flux(Policy):
    """Leaves: CLIP's pooled output ``(n, width)``. Latents are packed for the transformer alone."""

    trained: ClassVar[Mapping[str, int]] = {"text_encoder": 0}
    network_name: ClassVar[str] = "transformer"
    noise_level: ClassVar[float] = NOISE_LEVEL

    def check(self) -> None:
        """As the others; there is no negative prompt."""
        if self.config.negative_prompt or self.config.uncond == "full":
            raise ConfigError(
                "Flux reads no negative prompt, its guidance is a number; leave negative_prompt and uncond out"
            )

    @property
    def guided(self) -> bool:
        """Never: guidance is a number that the transformer reads."""
        return False

    def make_steps(self, count: int, *, noisy: bool = True) -> FlowSteps:
        """Rectified flow's; ``eta`` is 0.7 unless the settings say otherwise."""
        sigmas = None if self.scheduler.config.get("use_flow_sigmas") else torch.linspace(1, 1 / count, count).tolist()
        tokens = (self.latent_shape[-1] // 2) ** 2
        return make_flow_steps(self.scheduler, count, self.eta(noisy=noisy), self.device, tokens=tokens, sigmas=sigmas)

    def encode(self, texts: Sequence[str]) -> Leaves:
        """The pooled output."""
        return (self.read_clip("text_encoder", texts).pooler_output.float(),)

    def encode_frozen(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """T5's states ``(n, 512, width)``."""
        return (read_t5(self.pipeline.tokenizer_2, self.pipeline.text_encoder_2, texts, _T5_TOKENS, self.device),)

    def call_network(self, latents: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        """The transformer's prediction."""
        kind, (pooled,), (t5,) = self.network.dtype, text.leaves, text.frozen
        height, width = latents.shape[-2:]
        guidance = torch.full_like(timesteps, self.config.guidance) if self.network.config.guidance_embeds else None
        output: Tensor = self.network(
            pack(latents).to(kind),
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=pooled.to(kind),
            encoder_hidden_states=t5.to(kind),
            txt_ids=torch.zeros(t5.shape[1], 3, dtype=kind, device=self.device),
            img_ids=_positions(height // 2, width // 2).to(self.device, kind),
        )[0]
        return unpack(output, height, width)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Before they are packed."""
        side = self.count_latents(_SIDE, 2)
        return self.network.config.in_channels // 4, side, side


def pack(latents: Tensor) -> Tensor:
    """Latents ``(b, c, h, w)`` as the transformer reads them, a token for four: ``(b, h/2 · w/2, 4 · c)``."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Inverse of :func:`pack`."""
    b, _, c = tokens.shape
    return tokens.view(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def _positions(h: int, w: int) -> Tensor:
    """Every token's index, row and column ``(h · w, 3)``."""
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
