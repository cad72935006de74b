"""The conditional U-Net of latent diffusion (arXiv 2112.10752), in ``diffusers``' names."""

from dataclasses import dataclass

from texforce_hub.families.parameters import Weights, convolution, linear, norm, under


@dataclass(frozen=True, slots=True)
class UNet:
    """A ``UNet2DConditionModel``.

    ``transformers`` counts the transformer blocks of each down block's attentions, 0 where it has none;
    ``convolved`` says that an attention projects in and out by a 1 × 1 convolution (SD1), not linearly;
    ``added`` is the width of the added time conditioning (SDXL), 0 without.
    """

    channels: tuple[int, ...]
    transformers: tuple[int, ...]
    middle: int
    cross_attention_dim: int
    convolved: bool = False
    added: int = 0
    layers: int = 2
    latents: int = 4

    def weights(self) -> Weights:
        """Every parameter's name and shape."""
        first = self.channels[0]
        found = convolution("conv_in", first, self.latents, 3) | self._embedding("time_embedding", first)
        if self.added:
            found |= self._embedding("add_embedding", self.added)
        found |= self._down() | self._middle() | self._up()
        return found | norm("conv_norm_out", first) | convolution("conv_out", self.latents, first, 3)

    @property
    def _time(self) -> int:
        return 4 * self.channels[0]

    def _embedding(self, name: str, inner: int) -> Weights:
        return linear(f"{name}.linear_1", self._time, inner) | linear(f"{name}.linear_2", self._time, self._time)

    def _down(self) -> Weights:
        found: Weights = {}
        before = self.channels[0]
        last = len(self.channels) - 1
        for block, (width, depth) in enumerate(zip(self.channels, self.transformers)):
            for layer in range(self.layers):
                found |= under(f"down_blocks.{block}.resnets.{layer}", self._resnet(width, before))
                if depth:
                    found |= under(f"down_blocks.{block}.attentions.{layer}", self._attention(width, depth))
                before = width
            if block < last:
                found |= convolution(f"down_blocks.{block}.downsamplers.0.conv", width, width, 3)
        return found

    def _middle(self) -> Weights:
        width = self.channels[-1]
        found = under("mid_block.attentions.0", self._attention(width, self.middle))
        for layer in range(2):
            found |= under(f"mid_block.resnets.{layer}", self._resnet(width, width))
        return found

    def _up(self) -> Weights:
        """The way up mirrors the way down; each resnet also takes one skip connection."""
        found: Weights = {}
        skips = [self.channels[0]]
        last = len(self.channels) - 1
        for block, width in enumerate(self.channels):
            skips += [width] * (self.layers + (block < last))
        before = self.channels[-1]
        for block, (width, depth) in enumerate(zip(reversed(self.channels), reversed(self.transformers))):
            for layer in range(self.layers + 1):
                found |= under(f"up_blocks.{block}.resnets.{layer}", self._resnet(width, before + skips.pop()))
                if depth:
                    found |= under(f"up_blocks.{block}.attentions.{layer}", self._attention(width, depth))
                before = width
            if block < last:
                found |= convolution(f"up_blocks.{block}.upsamplers.0.conv", width, width, 3)
        return found

    def _resnet(self, out: int, inner: int) -> Weights:
        found = norm("norm1", inner) | convolution("conv1", out, inner, 3) | linear("time_emb_proj", out, self._time)
        found |= norm("norm2", out) | convolution("conv2", out, out, 3)
        return found | (convolution("conv_shortcut", out, inner, 1) if inner != out else {})

    def _attention(self, width: int, depth: int) -> Weights:
        found = norm("norm", width)
        for name in ("proj_in", "proj_out"):
            found |= convolution(name, width, width, 1) if self.convolved else linear(name, width, width)
        for block in range(depth):
            found |= under(f"transformer_blocks.{block}", self._transformer(width))
        return found

    def _transformer(self, width: int) -> Weights:
        found = norm("norm1", width) | norm("norm2", width) | norm("norm3", width)
        for name, context in (("attn1", width), ("attn2", self.cross_attention_dim)):
            found |= linear(f"{name}.to_q", width, width, bias=False)
            found |= linear(f"{name}.to_k", width, context, bias=False)
            found |= linear(f"{name}.to_v", width, context, bias=False)
            found |= linear(f"{name}.to_out.0", width, width)
        return found | linear("ff.net.0.proj", 8 * width, width) | linear("ff.net.2", width, 4 * width)
