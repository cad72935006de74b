"""Stable Diffusion 3 and 3.5: two CLIP encoders learn; T5, if it is there, stays as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from texforce_hub.train.policies.flow import FlowSteps, make_flow_steps
from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.policies.rows import Leaves, Text

NOISE_LEVEL = 0.7  # Flow-GRPO's
_T5_TOKENS = 256  # as the pipeline does


@dataclass(frozen=True, eq=False)
class StableDiffusion3(Policy):
    """Leaves: both CLIPs' states ``(n, length, widths)`` before the last layer, and pooled outputs ``(n, widths)``."""

    trained: ClassVar[Mapping[str, int]] = {"text_encoder": 0, "text_encoder_2": 0}
    network_name: ClassVar[str] = "transformer"
    noise_level: ClassVar[float] = NOISE_LEVEL

    def make_steps(self, count: int, *, noisy: bool = True) -> FlowSteps:
        """Rectified flow's; ``eta`` is 0.7 unless the settings say otherwise."""
        return make_flow_steps(self.scheduler, count, self.eta(noisy=noisy), self.device, tokens=self.tokens)

    @property
    def tokens(self) -> int:
        """Of a picture, as the transformer reads it."""
        side = self.latent_shape[-1] // self.network.config.patch_size
        return int(side * side)

    def encode(self, texts: Sequence[str]) -> Leaves:
        """Both CLIPs' states and pooled outputs."""
        outputs = [self.read_clip(part, texts, output_hidden_states=True) for part in self.trained]
        states = torch.cat([output.hidden_states[-2].float() for output in outputs], -1)
        return states, torch.cat([output.text_embeds.float() for output in outputs], -1)

    def encode_frozen(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """T5's states ``(n, 256, width)``, zeros without T5."""
        pipe = self.pipeline
        if pipe.text_encoder_3 is None:
            shape = len(texts), _T5_TOKENS, self.network.config.joint_attention_dim
            return (torch.zeros(shape, dtype=self.network.dtype, device=self.device),)
        return (read_t5(pipe.tokenizer_3, pipe.text_encoder_3, texts, _T5_TOKENS, self.device),)

    def call_network(self, latents: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        """The transformer's prediction."""
        kind, (states, pooled), (t5,) = self.network.dtype, text.leaves, text.frozen
        clip = functional.pad(states, (0, t5.shape[-1] - states.shape[-1]))
        given = {"encoder_hidden_states": torch.cat([clip.to(kind), t5.to(kind)], -2)}
        output: Tensor = self.network(
            latents.to(kind), timestep=timesteps, pooled_projections=pooled.to(kind), **given
        )[0]
        return output

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """As the transformer takes them."""
        config = self.network.config
        side = self.count_latents(config.sample_size, config.patch_size)
        return config.in_channels, side, side


@torch.no_grad()
def read_t5(tokenizer: Any, encoder: Any, texts: Sequence[str], length: int, device: torch.device) -> Tensor:
    """T5's states ``(n, length, width)``, padded and cut."""
    batch = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    states: Tensor = encoder(batch.input_ids.to(device))[0]
    return states
