"""Diffusion transformers: SD3's and Flux's two-stream blocks, PixArt's single stream, in ``diffusers``' names.

Only what LoRA files touch is listed: the blocks and the layers around them, without the norms of queries and
keys that have one entry per head channel.
"""

from dataclasses import dataclass
from typing import Literal

from texforce_hub.families.parameters import Weights, convolution, linear, under


@dataclass(frozen=True, slots=True)
class Transformer:
    """A diffusion transformer; ``singles`` counts Flux's blocks of one stream.

    ``originals`` are the layer names of the authors' own code, numbers written ``#``: files that spell them so
    are read under those names and written back unchanged. What they are here: ``families.originals``.
    """

    design: Literal["sd3", "flux", "pixart"]
    width: int
    blocks: int
    context: int
    singles: int = 0
    originals: tuple[str, ...] = ()

    def weights(self) -> Weights:
        """The parameters' names and shapes."""
        block = self._pixart_block() if self.design == "pixart" else self._joint_block()
        found = self._around()
        for index in range(self.blocks):
            found |= under(f"transformer_blocks.{index}", block)
        for index in range(self.singles):
            found |= under(f"single_transformer_blocks.{index}", self._single_block())
        return found if self.design != "sd3" else self._without_last_context(found)

    def _joint_block(self) -> Weights:
        width = self.width
        found = linear("norm1.linear", 6 * width, width) | linear("norm1_context.linear", 6 * width, width)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
            found |= linear(f"attn.{name}", width, width)
        for name in ("ff", "ff_context"):
            found |= linear(f"{name}.net.0.proj", 4 * width, width) | linear(f"{name}.net.2", width, 4 * width)
        return found

    def _without_last_context(self, found: Weights) -> Weights:
        """SD3's last block does not carry the text on: its context half ends at the attention."""
        last = f"transformer_blocks.{self.blocks - 1}"
        gone = (f"{last}.ff_context.", f"{last}.attn.to_add_out.")
        kept = {name: shape for name, shape in found.items() if not name.startswith(gone)}
        return kept | linear(f"{last}.norm1_context.linear", 2 * self.width, self.width)

    def _single_block(self) -> Weights:
        width = self.width
        found = linear("norm.linear", 3 * width, width) | linear("proj_mlp", 4 * width, width)
        for name in ("to_q", "to_k", "to_v"):
            found |= linear(f"attn.{name}", width, width)
        return found | linear("proj_out", width, 5 * width)

    def _pixart_block(self) -> Weights:
        width = self.width
        found: Weights = {"scale_shift_table": (6, width)}
        for attention in ("attn1", "attn2"):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                found |= linear(f"{attention}.{name}", width, width)
        return found | linear("ff.net.0.proj", 4 * width, width) | linear("ff.net.2", width, 4 * width)

    def _around(self) -> Weights:
        width = self.width
        if self.design == "pixart":
            found = convolution("pos_embed.proj", width, 4, 2) | linear("proj_out", 32, width)
            found |= linear("adaln_single.linear", 6 * width, width)
            found |= _embedder("adaln_single.emb.timestep_embedder", width, 256)
            return found | _embedder("caption_projection", width, self.context)
        found = linear("context_embedder", width, self.context) | linear("norm_out.linear", 2 * width, width)
        found |= linear("proj_out", 64, width) | _embedder("time_text_embed.timestep_embedder", width, 256)
        if self.design == "sd3":
            return found | convolution("pos_embed.proj", width, 16, 2) | self._pooled(2048)
        found |= linear("x_embedder", width, 64) | _embedder("time_text_embed.guidance_embedder", width, 256)
        return found | self._pooled(768)

    def _pooled(self, inner: int) -> Weights:
        return _embedder("time_text_embed.text_embedder", self.width, inner)


def _embedder(name: str, width: int, inner: int) -> Weights:
    return linear(f"{name}.linear_1", width, inner) | linear(f"{name}.linear_2", width, width)
