"""Text encoders: CLIP (arXiv 2103.00020, OpenCLIP in the same layout) and T5's encoder half (arXiv 1910.10683)."""

from dataclasses import dataclass

from texforce_hub.families.parameters import Weights, linear, norm, under


@dataclass(frozen=True, slots=True)
class ClipEncoder:
    """A CLIP text tower as ``transformers`` lays it out.

    ``projection`` is the width of ``text_projection``, ``None`` where the pipeline's class has none.
    """

    width: int
    layers: int
    projection: int | None = None
    vocabulary: int = 49408
    positions: int = 77

    def weights(self) -> Weights:
        """Every parameter's name inside the module, in the published spelling, and its shape."""
        found: Weights = {
            "text_model.embeddings.token_embedding.weight": (self.vocabulary, self.width),
            "text_model.embeddings.position_embedding.weight": (self.positions, self.width),
        }
        for index in range(self.layers):
            found |= under(f"text_model.encoder.layers.{index}", self._layer())
        found |= norm("text_model.final_layer_norm", self.width)
        if self.projection is not None:
            found |= linear("text_projection", self.projection, self.width, bias=False)
        return found

    def _layer(self) -> Weights:
        layer: Weights = {}
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            layer |= linear(f"self_attn.{name}", self.width, self.width)
        layer |= norm("layer_norm1", self.width)
        layer |= linear("mlp.fc1", 4 * self.width, self.width) | linear("mlp.fc2", self.width, 4 * self.width)
        return layer | norm("layer_norm2", self.width)


@dataclass(frozen=True, slots=True)
class T5Encoder:
    """T5 v1.1's encoder (gated feed-forward, norms without bias)."""

    width: int = 4096
    layers: int = 24
    inner: int = 4096
    mlp: int = 10240
    heads: int = 64
    vocabulary: int = 32128

    def weights(self) -> Weights:
        """Every parameter's name inside the module and its shape."""
        found: Weights = {"shared.weight": (self.vocabulary, self.width)}
        for index in range(self.layers):
            found |= under(f"encoder.block.{index}.layer", self._block(first=index == 0))
        return found | {"encoder.final_layer_norm.weight": (self.width,)}

    def _block(self, *, first: bool) -> Weights:
        block: Weights = {}
        for name in ("q", "k", "v"):
            block |= linear(f"0.SelfAttention.{name}", self.inner, self.width, bias=False)
        block |= linear("0.SelfAttention.o", self.width, self.inner, bias=False)
        if first:  # the position bias is shared by all blocks
            block["0.SelfAttention.relative_attention_bias.weight"] = (32, self.heads)
        for name in ("wi_0", "wi_1"):
            block |= linear(f"1.DenseReluDense.{name}", self.mlp, self.width, bias=False)
        block |= linear("1.DenseReluDense.wo", self.width, self.mlp, bias=False)
        return block | {f"{index}.layer_norm.weight": (self.width,) for index in (0, 1)}
