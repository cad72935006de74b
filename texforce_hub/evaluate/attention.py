"""Where a U-Net looks for every word of a prompt, without and with a stack: its cross-attention maps.

The maps are computed beside the U-Net's own attention, by hooks that change nothing, and averaged over heads, layers
and denoising steps (as DAAM, arXiv 2210.04885): the pictures are those that the pipeline draws anyway.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from texforce_hub.apply.applied import apply_adapter
from texforce_hub.errors import FamilyError, PromptError
from texforce_hub.evaluate.drawing import quiet
from texforce_hub.evaluate.words import word_spans
from texforce_hub.generate.draw import DrawSettings, sample
from texforce_hub.hub.stack import Item

_HALVINGS = 8  # how often a U-Net may halve its picture


@dataclass(frozen=True, slots=True, eq=False)
class WordAttention:
    """Where one word is looked for: maps ``(h, w)`` of the share of each place's attention that it gets, in [0, 1]."""

    word: str
    before: Tensor
    after: Tensor

    @property
    def shares(self) -> tuple[float, float]:
        """The word's share of all attention, without and with the stack, in [0, 1]."""
        return float(self.before.mean()), float(self.after.mean())


@dataclass(frozen=True, slots=True, eq=False)
class PromptAttention:
    """A prompt's words, and the pictures drawn from it without and with the stack, from the same noise."""

    prompt: str
    words: tuple[WordAttention, ...]
    before: Image.Image
    after: Image.Image


def measure_attention(
    pipe: Any,
    stack: Item | Sequence[Item],
    prompts: Sequence[str],
    *,
    seed: int = 0,
    inference_steps: int = 15,
    guidance: float = 5.0,
) -> list[PromptAttention]:
    """Draw every prompt without and with a stack, and see which words the U-Net attends to, and where.

    Args:
        pipe: an SD1, SD2 or SDXL pipeline; afterwards it is as it was.
        stack: as :func:`~texforce_hub.apply.applied.apply_adapter` takes it, of text encoders, the U-Net, or both.
        prompts: at least one; words beyond the encoder's length are not measured.

    Raises:
        PromptError: no prompts, or one with tags.
        FamilyError: a pipeline without cross-attention that can be watched.
        MatchError: a stack that does not fit.

    Example:
        >>> from texforce_hub.evaluate.attention import measure_attention
        >>> from texforce_hub.pipelines.load import load_pipeline
        >>> (seen,) = measure_attention(
        ...     load_pipeline("shapes", device="cpu"), "shapes-colour", ["a lime disc"], inference_steps=2)
        >>> [word.word for word in seen.words], tuple(seen.words[1].before.shape)
        (['a', 'lime', 'disc', '(end)'], (4, 4))
    """
    if not prompts:
        raise PromptError("no prompt to watch the attention of; give at least one")
    settings = DrawSettings(tuple(prompts), seed=seed, inference_steps=inference_steps, guidance=guidance)
    spans = [list(word_spans(pipe, prompt)) for prompt in prompts]
    with quiet(pipe), torch.no_grad():
        before = [_watch(pipe, settings, prompt) for prompt in prompts]
        with apply_adapter(pipe, stack):
            after = [_watch(pipe, settings, prompt) for prompt in prompts]
    return [
        PromptAttention(prompt, tuple(_compare(of_words, b_maps, a_maps)), b_image, a_image)
        for prompt, of_words, (b_image, b_maps), (a_image, a_maps) in zip(prompts, spans, before, after)
    ]


def _compare(spans: Sequence[tuple[str, int, int]], before: Tensor, after: Tensor) -> Iterator[WordAttention]:
    """Each word's maps: the sum over its tokens, of ``(tokens, h, w)``."""
    for word, start, end in spans:
        yield WordAttention(word, before[start:end].sum(0), after[start:end].sum(0))


def _watch(pipe: Any, settings: DrawSettings, prompt: str) -> tuple[Image.Image, Tensor]:
    """A prompt's picture, and its maps ``(tokens, h, w)``."""
    with watching(pipe.unet) as maps:
        (image,) = sample(pipe, settings, [settings.seed], {"prompt": [prompt]})
    return image, maps.mean()


class AttentionMaps:
    """Sums of attention ``(tokens, h, w)``, by the size of the layers' pictures; of a batch its last sample.

    Guidance puts the half of the prompt behind that of the negative prompt.
    """

    def __init__(self) -> None:
        self.size = (0, 0)
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.counts: dict[tuple[int, int], int] = {}

    def note_size(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before every call of the U-Net: how large its picture is."""
        latents: Tensor = given[0] if given else named["sample"]
        height, width = latents.shape[-2:]
        self.size = height, width

    def note_attention(self, layer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before every call of a cross-attention: where each token is looked for."""
        hidden: Tensor = given[0] if given else named["hidden_states"]
        words: Tensor | None = named.get("encoder_hidden_states")
        if words is None:
            return
        query = layer.head_to_batch_dim(layer.to_q(hidden[-1:]))
        key = layer.head_to_batch_dim(layer.to_k(words[-1:]))
        shares: Tensor = layer.get_attention_scores(query, key).float().mean(0)  # (places, tokens)
        size = _size_of(self.size, len(shares))
        self.sums[size] = self.sums.get(size, 0) + shares.T.reshape(-1, *size).cpu()
        self.counts[size] = self.counts.get(size, 0) + 1

    def mean(self) -> Tensor:
        """The mean over all layers and calls, at the size of the largest layer; the smaller ones are enlarged."""
        largest = max(self.sums)
        total: Tensor = sum(  # type: ignore[assignment]  # of at least one tensor
            functional.interpolate(sums[None], size=largest, mode="bilinear")[0] for sums in self.sums.values()
        )
        return total / sum(self.counts.values())


@contextmanager
def watching(unet: Any) -> Iterator[AttentionMaps]:
    """Note a U-Net's cross-attention while it is called; afterwards it is as it was.

    Raises:
        FamilyError: it has none, or one that is computed in an unusual way.
    """
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2") and _is_plain(module)]
    if not layers:
        raise FamilyError(f"{type(unet).__name__}: has no cross-attention whose maps can be computed beside it")
    maps = AttentionMaps()
    hooks = [unet.register_forward_pre_hook(maps.note_size, with_kwargs=True)]
    try:
        hooks += [layer.register_forward_pre_hook(maps.note_attention, with_kwargs=True) for layer in layers]
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def _is_plain(layer: Any) -> bool:
    """Whether a layer attends by its queries and keys alone."""
    needed = all(hasattr(layer, name) for name in ("to_q", "to_k", "head_to_batch_dim", "get_attention_scores"))
    norms = ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k")
    return needed and not any(getattr(layer, name, None) for name in norms)


def _size_of(latents: tuple[int, int], places: int) -> tuple[int, int]:
    """Height and width of a layer with so many places, whose picture was halved some times."""
    for halvings in range(_HALVINGS):
        height, width = (-(-side // 2**halvings) for side in latents)
        if height * width == places:
            return height, width
    raise FamilyError(f"a cross-attention over {places} places, which no halving of {latents} gives")
