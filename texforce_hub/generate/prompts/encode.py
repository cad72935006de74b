"""Prompts, each under its own stack, in one batch of embeddings.

Text adapters act before the first denoising step. So a batch can hold as many stacks as it has prompts, and the
U-Net, called once a step for all of them, never knows.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.per_sample import Stack, are_low_rank, per_sample_adapters, read_entries
from texforce_hub.arguments import Pipeline, check_pipeline, check_texts
from texforce_hub.errors import ConfigError, FamilyError, PromptError
from texforce_hub.generate.prompts.emphasis import Emphasis, may_be_weighted, read_emphasis
from texforce_hub.generate.prompts.tags import refuse_tags
from texforce_hub.generate.prompts.weighting import (
    EMPTY,
    clip_readers,
    count_chunks,
    encode_side_by_side,
    hushed,
    lengths_unsaid,
    say_cut,
)
from texforce_hub.hub.stack import StackEntry

logger = logging.getLogger("texforce_hub")

UNUSUAL = 2.0
"""A weight above it may be none: ``(16:9)``."""

_OUTPUTS: Mapping[str, tuple[str | None, ...]] = {
    "negative_pooled_prompt_embeds": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    "pooled_prompt_embeds": ("prompt_embeds", "pooled_prompt_embeds", None),
    "negative_prompt_attention_mask": (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    ),
    "negative_prompt_embeds": ("prompt_embeds", "negative_prompt_embeds"),
}
"""By a parameter of the pipeline's ``encode_prompt``, the first that is there: the names of what it returns."""


@contextmanager
def final_norms_named(pipe: Any) -> Iterator[None]:
    """Let ``clip_skip`` find the final norm of CLIP encoders that have no ``text_model`` inside (transformers 5).

    The pipelines of SD1 and SD2 ask for ``text_encoder.text_model.final_layer_norm`` whatever the version. The
    name is an instance attribute, which no ``state_dict`` and no walk over modules sees.
    """
    encoder = getattr(pipe, "text_encoder", None)
    flat = isinstance(encoder, nn.Module) and hasattr(encoder, "final_layer_norm")
    if not flat or hasattr(encoder, "text_model"):
        yield
        return
    encoder.__dict__["text_model"] = encoder
    try:
        yield
    finally:
        del encoder.__dict__["text_model"]


@dataclass(frozen=True, slots=True)
class ReadPrompts:
    """Prompts and their negative prompt with the weights of their words, and the chunks that all of them take."""

    prompts: tuple[Emphasis, ...]
    negative: Emphasis
    chunks: int = 1

    def only(self, members: Sequence[int]) -> "ReadPrompts":
        """Some of the prompts, in this order."""
        return ReadPrompts(tuple(self.prompts[i] for i in members), self.negative, self.chunks)


def read_prompts(
    pipe: Any,
    prompts: Sequence[str],
    *,
    negative_prompt: str = "",
    prompt_weights: str = "auto",
    long_prompts: bool = False,
    longest: int | None = None,
) -> ReadPrompts:
    """The prompts as a pipeline will read them; what it will not read, or reads otherwise than A1111, is said.

    ``longest`` is the call's ``max_sequence_length``, if it has one.

    Raises:
        PromptError: a prompt with a tag, or one that needs compel, which is not installed.
        RefError: weights that cannot be read.
        FamilyError: weights or long prompts for a pipeline that cannot have them.
    """
    for prompt in (*prompts, negative_prompt):
        refuse_tags(prompt, "take it out with read_tags(prompt, folder), which gives its adapter too")
    texts = tuple(read_emphasis(prompt, prompt_weights) for prompt in prompts)
    away = read_emphasis(negative_prompt, prompt_weights)
    everything = [*texts, away]
    if not long_prompts:
        say_cut(pipe, everything, longest=longest)
    for prompt, read in zip((*prompts, negative_prompt), everything) if prompt_weights == "auto" else ():
        if read.text == prompt and may_be_weighted(prompt):
            logger.info("%r: brackets and capital words are read as text; --prompt-weights on reads A1111's", prompt)
        if big := [f"{words!r} at {weight:g}" for words, weight in read.fragments if weight > UNUSUAL]:
            logger.info("%r: read with %s; --prompt-weights off reads it as text", prompt, ", ".join(big))
    return ReadPrompts(texts, away, count_chunks(pipe, everything) if long_prompts else 1)


@torch.no_grad()
def encode_prompts(
    pipe: Pipeline,
    prompts: Sequence[str],
    stacks: Sequence[Stack],
    *,
    negative_prompt: str = "",
    guided: bool = True,
    prompt_weights: str = "auto",
    long_prompts: bool = False,
    strict: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """Embeddings of each prompt under its own stack, as keyword arguments for one call of the pipeline.

    The negative prompt is encoded under the same stack as its prompt, as a pipeline with that stack on would do.

    Args:
        prompts: ``b`` of them.
        stacks: one for each prompt, as :func:`~texforce_hub.apply.applied.apply_adapter` takes them; ``None`` or
            an empty list: the pipeline as it is.
        negative_prompt: the one of all prompts; empty: what the pipeline does without one.
        guided: whether negative embeddings are needed (guidance above 1).
        prompt_weights: ``on``: ``(word:1.2)`` and the rest of A1111's syntax
            (:mod:`texforce_hub.generate.prompts.emphasis`);
            ``off``: parentheses are text; ``auto``: ``on`` for a prompt with a number or an escape in it.
        long_prompts: read prompts beyond the encoder's length in several chunks; all rows get as many as the
            longest prompt takes.
        strict: as in :func:`~texforce_hub.apply.applied.apply_adapter`.
        options: for the pipeline's own ``encode_prompt`` (``clip_skip``, ``max_sequence_length``).

    Returns:
        ``prompt_embeds (b, tokens, width)`` and, where the family has them, ``negative_prompt_embeds``,
        ``pooled_prompt_embeds (b, width)``, ``negative_pooled_prompt_embeds`` and attention masks.

    Raises:
        PromptError: no prompts, not one stack for each, a prompt with a tag, or compel is needed and missing.
        ConfigError: a stack that changes the U-Net, which all prompts share.
        FamilyError: weights or long prompts for a pipeline that cannot have them.
        MatchError: a stack that does not fit.
        RefError: weights that cannot be read.

    Example:
        >>> from texforce_hub import encode_prompts, load_pipeline
        >>> pipeline = load_pipeline("shapes", device="cpu")
        >>> given = encode_prompts(pipeline, ["a lime disc", "a red square"], ["shapes-colour", None])
        >>> given["prompt_embeds"].shape[0]
        2
    """
    check_pipeline(pipe)
    prompts = check_texts(prompts)
    if isinstance(stacks, str | Mapping) or not isinstance(stacks, Sequence):
        raise ConfigError(f"stacks {type(stacks).__name__}; expected a list, one stack or None for each prompt")
    if not prompts or len(prompts) != len(stacks):
        raise PromptError(f"{len(prompts)} prompts and {len(stacks)} stacks; expected one stack for each prompt")
    how: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "prompt_weights": prompt_weights,
        "long_prompts": long_prompts,
    }
    read = read_prompts(pipe, prompts, **how, longest=options.get("max_sequence_length"))
    rows: list[dict[str, Tensor]] = [{}] * len(prompts)
    for entries, members in _batches(pipe, read, stacks):
        embeddings = _encode_under(pipe, entries, read.only(members), guided=guided, strict=strict, **options)
        for position, member in enumerate(members):
            rows[member] = {name: tensor[position] for name, tensor in embeddings.items()}
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _batches(
    pipe: Any, read: ReadPrompts, stacks: Sequence[Stack]
) -> Iterator[tuple[list[list[StackEntry]], list[int]]]:
    """Prompts to be encoded in one call, and the stack of each, or one stack for all of them.

    Low-rank stacks ride beside the encoder together. Equal stacks of other layers are put on once; so are all where
    words have weights or a prompt takes several chunks, whose fragments are encoded one by one.
    """
    groups = _grouped(stacks)
    together: list[tuple[list[StackEntry], int]] = []
    in_turn: list[tuple[list[list[StackEntry]], list[int]]] = []
    plain = read.chunks == 1 and all(prompt.is_plain for prompt in (*read.prompts, read.negative))
    for stack, members in groups:
        entries = read_entries(stack)
        for entry in entries:
            _check_text_only(entry)
        if plain and len(groups) > 1 and are_low_rank(pipe, entries):
            together += [(entries, member) for member in members]
        else:
            in_turn.append(([entries], members))
    if together:
        yield [entries for entries, _ in together], [member for _, member in together]
    yield from in_turn


def _grouped(stacks: Sequence[Stack]) -> list[tuple[Stack, list[int]]]:
    """Equal stacks together, so that each is read and put on once."""
    groups: list[tuple[Stack, list[int]]] = []
    for index, stack in enumerate(stacks):
        group = next((members for other, members in groups if other is stack or other == stack), None)
        if group is None:
            groups.append((stack, [index]))
        else:
            group.append(index)
    return groups


def _encode_under(
    pipe: Any, stacks: Sequence[list[StackEntry]], read: ReadPrompts, *, guided: bool, strict: bool, **options: Any
) -> dict[str, Tensor]:
    items = [[entry.item for entry in entries] for entries in stacks]
    if not any(items):
        return _encode(pipe, read, guided=guided, **options)
    if len(items) > 1:
        with per_sample_adapters(pipe, items, strict=strict):
            return _encode(pipe, read, guided=guided, **options)
    with apply_adapter(pipe, items[0], strict=strict):
        return _encode(pipe, read, guided=guided, **options)


def _check_text_only(entry: StackEntry) -> None:
    others = [part for part in entry.adapter.parts if not part.startswith("text_encoder")]
    if others:
        raise ConfigError(
            f"{entry.label} changes the {others[0]}, which all prompts of a batch share; put it on with --unet or "
            f"apply_adapter, and give its text part only here"
        )


def _encode(pipe: Any, read: ReadPrompts, *, guided: bool, **options: Any) -> dict[str, Tensor]:
    embeddings = _encode_plainly(pipe, read, guided=guided, **options)
    whole = read.chunks > 1
    if whole or not all(prompt.is_plain for prompt in read.prompts):
        readers = clip_readers(pipe, clip_skip=options.get("clip_skip"))
        kept = list(embeddings["prompt_embeds"])
        for i, prompt in enumerate(read.prompts):
            if whole or not prompt.is_plain:
                kept[i] = encode_side_by_side(readers, prompt, chunks=read.chunks).to(kept[i])
        embeddings["prompt_embeds"] = torch.stack(kept)
    if "negative_prompt_embeds" in embeddings and (whole or not read.negative.is_plain):
        embeddings["negative_prompt_embeds"] = _encode_negative(pipe, read, embeddings["negative_prompt_embeds"])
    return embeddings


def _encode_negative(pipe: Any, read: ReadPrompts, plain: Tensor) -> Tensor:
    """The negative prompt at its weights and in all chunks; the pipelines skip none of its layers."""
    if read.negative == EMPTY and getattr(pipe.config, "force_zeros_for_empty_prompt", False):
        return plain.repeat(1, read.chunks, 1)  # zeros, by the pipeline's own rule
    row = encode_side_by_side(clip_readers(pipe), read.negative, chunks=read.chunks)
    return row.to(plain).expand(len(plain), -1, -1)


def _encode_plainly(pipe: Any, read: ReadPrompts, *, guided: bool, **options: Any) -> dict[str, Tensor]:
    """What the pipeline itself makes of the words without their weights, as many as it reads."""
    accepted = inspect.signature(pipe.encode_prompt).parameters
    names = next((names for mark, names in _OUTPUTS.items() if mark in accepted), None)
    if names is None:
        raise FamilyError(f"{type(pipe).__name__} has no encode_prompt whose embeddings its call takes back")
    prompts = [prompt.text for prompt in read.prompts]
    wanted: dict[str, Any] = {"prompt": prompts, "device": pipe._execution_device, "num_images_per_prompt": 1}
    wanted |= {"do_classifier_free_guidance": guided, "prompt_2": None, "prompt_3": None}
    if guided and read.negative.text:  # without one, SDXL's is zeros, not an empty text
        wanted["negative_prompt"] = [read.negative.text] * len(prompts)
    given = {name: value for name, value in wanted.items() if name in accepted}
    # the pipeline would say that it cuts a prompt which is read in chunks
    words = hushed(type(pipe).__module__) if read.chunks > 1 else nullcontext()
    with final_norms_named(pipe), lengths_unsaid(), words:
        embeddings = pipe.encode_prompt(**given, **options)
    return {name: t for name, t in zip(names, embeddings, strict=True) if name is not None and t is not None}
