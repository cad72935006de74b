"""Prompts, each under its own stack, in one batch of embeddings.

Text adapters act before the first denoising step. So a batch can hold as many stacks as it has prompts, and the
U-Net, called once a step for all of them, never knows.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from texforce_hub.apply import apply_adapter
from texforce_hub.errors import ConfigError, FamilyError, PromptError
from texforce_hub.stack import Entry, Item, read_stack

Stack = Item | Sequence[Item] | None

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


@torch.no_grad()
def encode_prompts(
    pipe: Any,
    prompts: Sequence[str],
    stacks: Sequence[Stack],
    *,
    negative: str = "",
    guided: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """Embeddings of each prompt under its own stack, as keyword arguments for one call of the pipeline.

    The negative prompt is encoded under the same stack as its prompt, as a pipeline with that stack on would do.

    Args:
        prompts: ``b`` of them.
        stacks: one for each prompt, as :func:`~texforce_hub.apply.apply_adapter` takes them; ``None``: the base.
        negative: the negative prompt of all; empty: what the pipeline does without one.
        guided: whether negative embeddings are needed (guidance above 1).
        options: for the pipeline's own ``encode_prompt`` (``clip_skip``, ``max_sequence_length``).

    Returns:
        ``prompt_embeds (b, tokens, width)`` and, where the family has them, ``negative_prompt_embeds``,
        ``pooled_prompt_embeds (b, width)``, ``negative_pooled_prompt_embeds`` and attention masks.

    Raises:
        PromptError: no prompts, or not one stack for each.
        ConfigError: a stack that changes the U-Net, which all prompts share.
        MatchError: a stack that does not fit.
    """
    if not prompts or len(prompts) != len(stacks):
        raise PromptError(f"{len(prompts)} prompts and {len(stacks)} stacks; expected one stack for each prompt")
    rows: list[dict[str, Tensor]] = [{}] * len(prompts)
    for stack, members in _grouped(stacks):
        embeddings = _encode_under(pipe, stack, [prompts[i] for i in members], negative, guided=guided, **options)
        for position, member in enumerate(members):
            rows[member] = {name: tensor[position] for name, tensor in embeddings.items()}
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _grouped(stacks: Sequence[Stack]) -> list[tuple[Stack, list[int]]]:
    """Equal stacks together, so that each is put on once."""
    groups: list[tuple[Stack, list[int]]] = []
    for index, stack in enumerate(stacks):
        home = next((members for other, members in groups if other is stack or other == stack), None)
        if home is None:
            groups.append((stack, [index]))
        else:
            home.append(index)
    return groups


def _encode_under(
    pipe: Any, stack: Stack, prompts: list[str], negative: str, *, guided: bool, **options: Any
) -> dict[str, Tensor]:
    if stack is None:
        return _encode(pipe, prompts, negative, guided=guided, **options)
    entries = read_stack(stack)
    for entry in entries:
        _check_text_only(entry)
    with apply_adapter(pipe, [entry.item for entry in entries]):
        return _encode(pipe, prompts, negative, guided=guided, **options)


def _check_text_only(entry: Entry) -> None:
    others = [part for part in entry.adapter.parts if not part.startswith("text_encoder")]
    if others:
        raise ConfigError(
            f"{entry.label} changes the {others[0]}, which all prompts of a batch share; put it on with --unet or "
            f"apply_adapter, and give its text part only here"
        )


def _encode(pipe: Any, prompts: list[str], negative: str, *, guided: bool, **options: Any) -> dict[str, Tensor]:
    accepted = inspect.signature(pipe.encode_prompt).parameters
    names = next((names for mark, names in _OUTPUTS.items() if mark in accepted), None)
    if names is None:
        raise FamilyError(f"{type(pipe).__name__} has no encode_prompt whose embeddings its call takes back")
    wanted: dict[str, Any] = {"prompt": prompts, "device": pipe._execution_device, "num_images_per_prompt": 1}
    wanted |= {"do_classifier_free_guidance": guided, "prompt_2": None, "prompt_3": None}
    if guided and negative:  # without one, SDXL's is zeros, not an empty text
        wanted["negative_prompt"] = [negative] * len(prompts)
    given = {name: value for name, value in wanted.items() if name in accepted}
    with final_norms_named(pipe):
        found = pipe.encode_prompt(**given, **options)
    return {name: t for name, t in zip(names, found, strict=True) if name is not None and t is not None}
