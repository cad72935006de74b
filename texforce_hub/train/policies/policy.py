"""The contract: a policy encodes prompts, denoises step by step, and decodes; gradients come back to the embeddings.

What a family has of its own is abstract here, or a class variable; the rest is shared by all.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor

from texforce_hub.errors import ConfigError
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.policies.frozen import move_frozen
from texforce_hub.train.policies.rows import Leaves, Rows, Text, in_slices
from texforce_hub.train.policies.steps import Steps


@dataclass(frozen=True, eq=False)
class Policy(ABC):
    """A frozen pipeline, and copies of its text encoders that carry the LoRA, by part."""

    pipeline: Any
    encoders: Mapping[str, Any]
    scheduler: Any  # as the family samples in training
    config: TrainConfig

    trained: ClassVar[Mapping[str, int]] = {"text_encoder": 0}
    """The encoders that learn, and how many of their last layers no gradient reaches."""
    network_name: ClassVar[str] = "unet"
    noise_level: ClassVar[float] = 1.0
    """Of the denoising steps, where the settings leave ``eta`` open."""

    @property
    def network(self) -> Any:
        """The frozen network that predicts."""
        return getattr(self.pipeline, self.network_name)

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        device: torch.device = self.network.device
        return device

    @property
    def reference(self) -> Self:
        """The same with the text encoders as they were."""
        return replace(self, encoders={part: getattr(self.pipeline, part) for part in self.encoders})

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on; as in diffusers, up to 1 it is not."""
        return self.config.guidance > 1

    @property
    def trains_negative(self) -> bool:
        """Whether the negative prompt's embedding has a gradient."""
        return self.guided and self.config.uncond == "full"

    def eta(self, *, noisy: bool) -> float:
        """The noise of the denoising steps, 0 for none."""
        return (self.noise_level if self.config.eta is None else self.config.eta) if noisy else 0.0

    def check(self) -> None:  # noqa: B027  # most families can have every setting
        """Refuse settings that the family cannot have.

        Raises:
            ConfigError: there is one.
        """

    @abstractmethod
    def make_steps(self, count: int, *, noisy: bool = True) -> Steps:
        """The denoising steps of a chain of ``count``, with the noise of the settings or without any."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Leaves:
        """What the trained text encoders say, padded and cut as the pipeline itself does, float32."""

    @abstractmethod
    def call_network(self, latents: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        """The network's own prediction ``(b, c, h, w)``."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture's latents."""

    def encode_frozen(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """What text encoders that are not trained say of the texts."""
        del texts
        return ()

    def read_clip(self, part: str, texts: Sequence[str], **options: Any) -> Any:
        """A CLIP encoder's output."""
        tokenizer = getattr(self.pipeline, part.replace("text_encoder", "tokenizer"))
        length = tokenizer.model_max_length
        self._wake(part)
        batch = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.encoders[part](batch.input_ids.to(self.device), **options)

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """The prompts, and the negative one if it is trained, too."""
        return [*prompts, *([self.config.negative_prompt] if self.trains_negative else [])]

    def encode_negative(self) -> Text:
        """What the network reads of the negative prompt, one row."""
        texts = [self.config.negative_prompt]
        return Text(self.encode(texts), self.encode_frozen(texts))

    @torch.no_grad()
    def rows(self, prompts: Sequence[str], images: int) -> Rows:
        """What ``images`` pictures of every prompt are drawn from, prompt by prompt."""
        group, negative = torch.arange(len(prompts), device=self.device).repeat_interleave(images), None
        encoders = [part for part in self.pipeline.components if part.startswith("text_encoder")]
        self._wake(*encoders)
        if self.guided:
            policy = self.reference if self.config.uncond == "base" else self
            negative = policy.encode_negative().take(torch.zeros_like(group))
        prompt = Text(self.encode(prompts), self.encode_frozen(prompts)).take(group)
        if self.config.offload:  # the network's turn is next
            for part in encoders:
                self._move(part, "cpu")
        return Rows(group, prompt, negative)

    def _wake(self, *parts: str) -> None:
        """Have parts of the pipeline on the device that may wait on the CPU."""
        for part in parts if self.config.offload else ():
            self._move(part, self.device)

    def _move(self, part: str, device: torch.device | str) -> None:
        if (module := getattr(self.pipeline, part)) is not None:
            move_frozen(module, device)  # the copies that learn share its weights

    def leaves(self, rows: Rows) -> tuple[Rows, Leaves]:
        """The rows anew, with those embeddings that are trained as leaves of a graph."""
        prompt, negative = rows.prompt.opened(), rows.negative
        if not self.trains_negative or negative is None:
            return rows._replace(prompt=prompt), prompt.leaves
        negative = negative.opened()
        return Rows(rows.group, prompt, negative), (*prompt.leaves, *negative.leaves)

    def gather(self, group: Tensor, gradients: Sequence[Tensor], prompts: int) -> Leaves:
        """The leaves' gradients, a row a picture, summed to those of the texts."""
        number = len(gradients) // 2 if self.trains_negative else len(gradients)
        totals = [g.new_zeros(prompts + self.trains_negative, *g.shape[1:]) for g in gradients[:number]]
        for total, gradient in zip(totals, gradients[:number], strict=True):
            total.index_add_(0, group, gradient)
        for total, gradient in zip(totals, gradients[number:], strict=False):
            total[-1] += gradient.sum(0)
        return tuple(totals)

    def predict(self, latents: Tensor, timesteps: Tensor, rows: Rows) -> Tensor:
        """The prediction ``(b, c, h, w)`` under classifier-free guidance (arXiv 2207.12598), float32."""
        times = timesteps.expand(len(latents))
        if rows.negative is None:
            return self.call_network(latents, times, rows.prompt).float()
        if torch.is_grad_enabled():
            with torch.set_grad_enabled(rows.negative.leaves[0].requires_grad):
                negative = self.call_network(latents, times, rows.negative).float()
            prompt = self.call_network(latents, times, rows.prompt).float()
        else:
            both = rows.prompt.beside(rows.negative)
            output = self.call_network(latents.repeat(2, 1, 1, 1), times.repeat(2), both)
            prompt, negative = output.float().chunk(2)
        return negative + self.config.guidance * (prompt - negative)

    def draw_noise(self, count: int, generator: Generator) -> Tensor:
        """``count`` latents of pure noise, drawn on the CPU: every device gets the same."""
        return torch.randn((count, *self.latent_shape), generator=generator).to(self.device)

    def count_latents(self, own: int, unit: int = 1) -> int:
        """A side of the latents for the wanted resolution, a multiple of ``unit``; ``own`` without one.

        Raises:
            ConfigError: the resolution is no multiple of what the pipeline draws.
        """
        resolution, factor = self.config.resolution, self.pipeline.vae_scale_factor
        if resolution is None:
            return own
        if resolution % (factor * unit):
            raise ConfigError(f"resolution = {resolution}; expected a multiple of {factor * unit} for this base")
        return int(resolution // factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures ``(b, 3, h, w)`` in [0, 1], float32; a saturated pixel has a gradient, so that it can come back."""
        vae = self.pipeline.vae
        self._wake("vae")
        shift = vae.config.get("shift_factor") or 0.0

        def decode_some(some: Tensor) -> Tensor:
            pixels: Tensor = vae.decode(some.to(vae.dtype) / vae.config.scaling_factor + shift).sample.float() / 2 + 0.5
            return pixels.detach().clamp(0, 1) + (pixels - pixels.detach())

        images = in_slices(decode_some, self.config.batch_size, latents)
        if self.config.offload and not images.requires_grad:  # a gradient has still to come back through it
            self._move("vae", "cpu")
        return images
