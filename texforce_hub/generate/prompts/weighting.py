"""Weights of words, and prompts longer than the text encoder, for CLIP: by ``compel``, as an extra.

compel scales the difference between a word's embedding and that of the empty prompt, and blends towards the
prompt without the word below 1. A long prompt is read in several chunks of the encoder's length, one behind the
other. A1111 has another arithmetic for the same syntax: pictures are alike, not the same.
"""

import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from texforce_hub.errors import FamilyError, PromptError
from texforce_hub.generate.prompts.emphasis import Emphasis
from texforce_hub.reading import first_line

_LOG = logging.getLogger("texforce_hub")

EMPTY = Emphasis(())
_CUTS_ARE_SAID: ContextVar[bool] = ContextVar("cuts_are_said", default=False)


@dataclass(frozen=True, eq=False)
class ClipReader:
    """One CLIP text encoder as its pipeline reads it: which layer, through the final norm or not.

    It stands in for the encoder where compel calls that, so that compel's embeddings are the pipeline's.
    """

    tokenizer: Any
    encoder: Any
    device: torch.device
    layer: int = -1
    normed: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings."""
        dtype: torch.dtype = self.encoder.dtype
        return dtype

    @property
    def limit(self) -> int:
        """Tokens in a chunk, start and end included."""
        return int(self.tokenizer.model_max_length)

    def __call__(self, ids: Tensor, mask: Tensor | None = None, **_: Any) -> Any:
        """The encoder's output for ``ids (b, tokens)``; its ``last_hidden_state`` is the layer that is read."""
        if mask is not None and bool(mask.all()):
            mask = None  # as the pipelines call it, to the bit
        output = self.encoder(ids, attention_mask=mask, output_hidden_states=True)
        if self.layer != -1 or not self.normed:
            output.last_hidden_state = output.hidden_states[self.layer]
            if self.normed:
                output.last_hidden_state = _final_norm(self.encoder)(output.last_hidden_state)
        return output

    def count_chunks(self, emphasis: Emphasis) -> int:
        """Chunks that a prompt takes, at least 1."""
        texts, weights = _as_compel(emphasis)
        with lengths_unsaid():
            ids, _, _ = _provider(self, whole=True).get_token_ids_and_expand_weights(texts, weights, device="cpu")
        return int(ids.shape[0]) // self.limit

    def encode(self, emphasis: Emphasis, *, chunks: int = 1) -> Tensor:
        """Embeddings ``(chunks · limit, width)``: cut after one chunk, or padded with the empty prompt's."""
        provider = _provider(self, whole=chunks > 1)
        texts, weights = _as_compel(emphasis)
        try:
            with lengths_unsaid():
                embedding = provider.get_embeddings_for_weighted_prompt_fragments(
                    [texts], [weights], device=self.device
                )[0]
        except RuntimeError as error:  # its search for the words below 1 can lose its place behind padding
            raise PromptError(f"{str(emphasis)!r}: compel cannot place its weights: {first_line(error)}") from error
        missing = chunks - embedding.shape[0] // self.limit
        return torch.cat([embedding, *[provider.empty_z[0].to(embedding)] * missing])


@contextmanager
def hushed(name: str) -> Iterator[None]:
    """No word below an error from the logger of this name, and afterwards as it was."""
    heard = logging.getLogger(name)
    before = heard.level
    heard.setLevel(logging.ERROR)
    try:
        yield
    finally:
        heard.setLevel(before)


def lengths_unsaid() -> AbstractContextManager[None]:
    """No word from transformers that a text longer than the model will fail: no model gets one, it is cut or split."""
    return hushed("transformers.tokenization_utils_base")


def clip_readers(pipe: Any, *, clip_skip: int | None = None) -> list[ClipReader]:
    """The CLIP encoders of a pipeline whose embeddings, side by side, are all that its U-Net reads of a prompt.

    Raises:
        FamilyError: the pipeline is none of SD1, SD2 and SDXL.
    """
    there = _encoders(pipe)
    if getattr(pipe, "unet", None) is None or not there or not all(_is_clip(e) for _, e in there):
        raise FamilyError(f"{type(pipe).__name__} reads no weights and no long prompts; SD1, SD2 and SDXL do")
    two = getattr(pipe, "text_encoder_2", None) is not None  # SDXL and its refiner read the last layer but one
    layer = -(clip_skip or 0) - (2 if two else 1)
    return [
        ClipReader(tokenizer, encoder, torch.device(pipe._execution_device), layer, normed=not two)
        for tokenizer, encoder in there
    ]


def encode_side_by_side(readers: Sequence[ClipReader], emphasis: Emphasis, *, chunks: int = 1) -> Tensor:
    """A prompt's embeddings by all encoders, ``(chunks · limit, sum of the widths)``."""
    return torch.cat([reader.encode(emphasis, chunks=chunks) for reader in readers], dim=-1)


def count_chunks(pipe: Any, prompts: Iterable[Emphasis]) -> int:
    """Chunks that the longest of these prompts takes.

    Raises:
        FamilyError: the pipeline is none of SD1, SD2 and SDXL.
        PromptError: compel is not installed.
    """
    readers = clip_readers(pipe)
    return max((reader.count_chunks(prompt) for prompt in prompts for reader in readers), default=1)


def say_cut(pipe: Any, prompts: Iterable[Emphasis], *, longest: int | None = None, way_out: str | None = None) -> None:
    """Say which words of which prompts are beyond the length of every text encoder and will not be read."""
    if _CUTS_ARE_SAID.get():
        return
    for prompt, limit, cut in find_cut(pipe, prompts, longest=longest):
        shown = prompt.text, limit, cut, way_out or _way_out(pipe)
        _LOG.warning("%r is longer than the text encoder's %d tokens; not read: %r; %s", *shown)


@contextmanager
def cuts_said() -> Iterator[None]:
    """Nothing more of cut prompts in the block: whoever draws many batches of the same prompts has said it already."""
    before = _CUTS_ARE_SAID.set(True)
    try:
        yield
    finally:
        _CUTS_ARE_SAID.reset(before)


def find_cut(
    pipe: Any, prompts: Iterable[Emphasis], *, longest: int | None = None
) -> Iterator[tuple[Emphasis, int, str]]:
    """The prompts that are beyond the length of every text encoder, that length in tokens, and what is cut off.

    ``longest``: of the encoders that are not CLIP; by default what the pipeline's ``encode_prompt`` says.
    """
    if longest is None:
        encode = getattr(pipe, "encode_prompt", None)
        parameter = inspect.signature(encode).parameters.get("max_sequence_length") if encode else None
        longest = parameter.default if parameter is not None else 0
    limits = [(int(t.model_max_length) if _is_clip(e) else longest or 0, t) for t, e in _encoders(pipe)]
    if not limits:
        return
    limit, tokenizer = max(limits, key=lambda pair: pair[0])
    for prompt in dict.fromkeys(prompts) if limit else ():
        ids = [
            i
            for text, _ in prompt.fragments
            for i in tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ]
        if cut := ids[limit - tokenizer.num_special_tokens_to_add() :]:
            yield prompt, limit, tokenizer.decode(cut).strip()


def _way_out(pipe: Any) -> str:
    longer = getattr(pipe, "unet", None) is not None
    return "--long-prompts (long_prompts=True) reads all of it" if longer else "say it in fewer words"


def _encoders(pipe: Any) -> list[tuple[Any, Any]]:
    pairs = [(getattr(pipe, f"tokenizer{n}", None), getattr(pipe, f"text_encoder{n}", None)) for n in ("", "_2", "_3")]
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if tokenizer is not None and encoder is not None]


def _is_clip(encoder: Any) -> bool:
    return "clip" in str(getattr(encoder.config, "model_type", ""))


def _final_norm(encoder: Any) -> Any:
    return encoder.final_layer_norm if hasattr(encoder, "final_layer_norm") else encoder.text_model.final_layer_norm


def _as_compel(emphasis: Emphasis) -> tuple[list[str], list[float]]:
    """Words and weights as compel takes them: blanks alone are no words, and nothing is one empty text."""
    fragments = [(text, weight) for text, weight in emphasis.fragments if text.strip()] or [("", 1.0)]
    return [text for text, _ in fragments], [weight for _, weight in fragments]


def _provider(reader: ClipReader, *, whole: bool) -> Any:
    try:
        from compel.embeddings_provider import EmbeddingsProvider, SplitLongTextMode
    except ImportError as error:
        raise PromptError(
            "weights in a prompt and long prompts need compel: pip install 'texforce-hub[prompt]' "
            "(prompt weights 'off' reads parentheses as text)"
        ) from error
    mode = SplitLongTextMode.SENTENCES  # compel's own choice for pipelines
    return EmbeddingsProvider(reader.tokenizer, reader, truncate=not whole, split_long_text_mode=mode)
