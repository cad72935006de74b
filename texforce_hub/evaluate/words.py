"""Which words a stack of text adapters moves: the shift of every word's embedding in a prompt.

Text encoders of Stable Diffusion are causal: a word's embedding carries the words before it, so what follows a word
that moved moves too, and what precedes it cannot.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from texforce_hub.apply.per_sample import Stack
from texforce_hub.arguments import Pipeline, check_texts
from texforce_hub.errors import ConfigError, FamilyError, PromptError
from texforce_hub.generate.prompts.encode import encode_prompts

END = "(end)"
"""The token after the last word: it has seen the whole prompt, and SDXL's pooled output is made from it."""


@dataclass(frozen=True, slots=True)
class WordShift:
    """What a stack does to one word.

    shift: ``‖after − before‖ / ‖before‖`` over the embeddings of the word's tokens
    cosine: between before and after, in [-1, 1]
    """

    word: str
    shift: float
    cosine: float


@dataclass(frozen=True, slots=True)
class PromptShift:
    """What a stack does to a prompt: each of its words in order, then the token that ends it."""

    prompt: str
    words: tuple[WordShift, ...]

    def as_dict(self) -> dict[str, Any]:
        """The shifts as plain data, ready for JSON."""
        return asdict(self)


def measure_words(pipe: Pipeline, stack: Stack, prompts: Sequence[str]) -> list[PromptShift]:
    """How far a stack moves every word of some prompts, by the embeddings that the U-Net gets.

    Args:
        pipe: an SD1, SD2 or SDXL pipeline; afterwards it is as it was.
        stack: as :func:`~texforce_hub.apply.applied.apply_adapter` takes it; text adapters only.
        prompts: at least one; words beyond the encoder's length are not measured.

    Raises:
        PromptError: no prompts, or one with tags.
        FamilyError: a pipeline whose embeddings do not lie token by token as its CLIP tokenizer cuts them.
        ConfigError: a stack that changes the U-Net, or moves a word by no finite amount.
        MatchError: a stack that does not fit.

    Example:
        >>> from texforce_hub import load_pipeline, measure_words
        >>> pipeline = load_pipeline("shapes", device="cpu")
        >>> (measured,) = measure_words(pipeline, "shapes-colour", ["a lime disc"])
        >>> [word.word for word in measured.words]
        ['a', 'lime', 'disc', '(end)']
        >>> measured.words[0].shift < measured.words[1].shift
        True
    """
    prompts = check_texts(prompts)
    if not prompts:
        raise PromptError("no prompt to measure words in; give at least one")
    spans = [list(word_spans(pipe, prompt)) for prompt in prompts]
    how: dict[str, Any] = {"guided": False, "prompt_weights": "off"}
    before = encode_prompts(pipe, prompts, [None] * len(prompts), **how)["prompt_embeds"].float()
    after = encode_prompts(pipe, prompts, [stack] * len(prompts), **how)["prompt_embeds"].float()
    return [
        PromptShift(prompt, tuple(_shift(word, b[start:end], a[start:end]) for word, start, end in words))
        for prompt, words, b, a in zip(prompts, spans, before, after)
    ]


def _shift(word: str, before: Tensor, after: Tensor) -> WordShift:
    """One word's shift, from its tokens' embeddings ``(tokens, width)``."""
    cosine = torch.cosine_similarity(before.flatten(), after.flatten(), dim=0)
    shift = WordShift(word, float((after - before).norm() / before.norm()), float(cosine))
    if not (math.isfinite(shift.shift) and math.isfinite(shift.cosine)):
        raise ConfigError(
            f"the word {word!r} is moved by {shift.shift}; expected a finite number: give the stack smaller weights"
        )
    return shift


def word_spans(pipe: Any, prompt: str) -> Iterator[tuple[str, int, int]]:
    """Words with their first token and the one after their last, as the pipeline's CLIP tokenizer cuts them.

    Raises:
        FamilyError: a pipeline whose embeddings do not lie token by token so.
    """
    tokenizer: Any = getattr(pipe, "tokenizer", None)
    if not hasattr(pipe, "unet") or not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise FamilyError(f"{type(pipe).__name__}: words are measured in SD1, SD2 and SDXL pipelines only")
    longest = tokenizer.model_max_length
    ids = tokenizer(prompt, truncation=True, max_length=longest, return_tensors=None).input_ids
    start, word = 1, ""
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(ids[1:-1]), 1):
        word += token.removesuffix("</w>")
        if token.endswith("</w>") or index == len(ids) - 2:
            yield word, start, index + 1
            start, word = index + 1, ""
    yield END, len(ids) - 1, len(ids)
