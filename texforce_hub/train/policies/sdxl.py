"""Stable Diffusion XL and SDXL-Turbo: two text encoders beside each other, and the second one's pooled output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from texforce_hub.errors import ConfigError
from texforce_hub.train.policies.rows import Leaves, Text
from texforce_hub.train.policies.stable_diffusion import StableDiffusion


@dataclass(frozen=True, eq=False)
class StableDiffusionXL(StableDiffusion):
    """Leaves: the states ``(n, length, both widths)`` before the last layer, and the pooled output ``(n, width)``."""

    # The first encoder's last layer leads nowhere: its states are read before it, and it has no pooled output.
    trained: ClassVar[Mapping[str, int]] = {"text_encoder": 1, "text_encoder_2": 0}

    @property
    def has_no_negative(self) -> bool:
        """Whether the base takes zeros for an empty negative prompt."""
        return not self.config.negative_prompt and bool(self.pipeline.config.get("force_zeros_for_empty_prompt"))

    def check(self) -> None:
        """As the others; nothing is trained through zeros."""
        if self.trains_negative and self.has_no_negative:
            raise ConfigError(
                'uncond = "full" trains the negative prompt, and this base takes zeros for an empty one; give a '
                "negative_prompt, or leave uncond out"
            )

    def encode(self, texts: Sequence[str]) -> Leaves:
        """Both encoders' states and the pooled output."""
        outputs = [self.read_clip(part, texts, output_hidden_states=True) for part in self.trained]
        states = torch.cat([output.hidden_states[-2].float() for output in outputs], -1)
        return states, outputs[-1].text_embeds.float()

    def encode_negative(self) -> Text:
        """What the U-Net reads of the negative prompt, one row: zeros where there is none."""
        text = super().encode_negative()
        return Text(tuple(map(torch.zeros_like, text.leaves))) if self.has_no_negative else text

    def call_network(self, latents: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        """The U-Net's prediction for pictures that were neither scaled nor cut."""
        kind, (states, pooled) = self.network.dtype, text.leaves
        height, width = (side * self.pipeline.vae_scale_factor for side in latents.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=kind, device=self.device)
        added = {"text_embeds": pooled.to(kind), "time_ids": sizes.expand(len(latents), -1)}
        given = {"encoder_hidden_states": states.to(kind), "added_cond_kwargs": added}
        output: Tensor = self.network(latents.to(kind), timesteps, **given).sample
        return output
