"""Drive a pipeline: prompts in, images with their origin out."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image

from texforce_hub.apply.per_sample import Stack
from texforce_hub.arguments import Pipeline, check_kind, check_pipeline
from texforce_hub.errors import ConfigError, PromptError
from texforce_hub.generate.prompts.emphasis import check_way
from texforce_hub.generate.prompts.encode import encode_prompts, final_norms_named, read_prompts
from texforce_hub.generate.prompts.tags import refuse_tags
from texforce_hub.reading import first_line

logger = logging.getLogger("texforce_hub")


_LEAST = {"seed": 0, "clip_skip": 0}
_MOST = {"inference_steps": 1000, "num_images": 10_000, "batch_size": 10_000, "seed": 2**63 - 10_001}
_MOST |= {"width": 16_384, "height": 16_384, "clip_skip": 100}
"""What a setting can be at most: a slip of the finger is refused before anything is loaded."""


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """How to sample. Image ``i`` of a prompt has seed ``seed + i``, whatever the batch size.

    ``prompt_weights`` and ``long_prompts`` are as in :func:`~texforce_hub.generate.prompts.encode.encode_prompts`.
    """

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    inference_steps: int = 30
    guidance: float = 7.5
    seed: int = 0
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    batch_size: int = 8
    clip_skip: int | None = None
    prompt_weights: str = "auto"
    long_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise PromptError("an empty prompt; expected at least one word")
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or not _LEAST.get(name, 1) <= value <= most):
                raise ConfigError(
                    f"{name} is {value!r}; expected a whole number from {_LEAST.get(name, 1)} to {most:,}"
                )
        if not math.isfinite(self.guidance):
            raise ConfigError(f"guidance is {self.guidance}; expected a finite number")
        check_way(self.prompt_weights)
        refuse_tags(self.negative_prompt, "no tag acts in a negative prompt; give it a weight below 0 in the prompt")

    def jobs(self) -> list[tuple[str, int]]:
        """Prompt and seed of every image, prompt by prompt."""
        return [(prompt, self.seed + i) for prompt in self.prompts for i in range(self.num_images)]


Cell = tuple[str, int, Stack]
"""One image to draw: its prompt, its seed, and the stack of its text encoders (none: the pipeline as it is)."""


def generate_images(
    pipe: Pipeline, settings: DrawSettings, *, on_step: Callable[[int], None] | None = None
) -> list[Image.Image]:
    """One image a job, in the jobs' order; ``on_step(images)`` is called after each denoising step of a batch.

    Raises:
        PromptError: a prompt with a tag, or one that needs compel, which is not installed.
        RefError: weights in a prompt that cannot be read.
        ConfigError: something that the pipeline refuses.

    Example:
        >>> from texforce_hub import DrawSettings, generate_images, load_pipeline
        >>> settings = DrawSettings(("a lime disc",), inference_steps=2, num_images=2)
        >>> [image.size for image in generate_images(load_pipeline("shapes", device="cpu"), settings)]
        [(32, 32), (32, 32)]
    """
    check_pipeline(pipe)
    check_kind(settings, DrawSettings, "give DrawSettings((prompt, ...))")
    jobs = settings.jobs()
    read = read_prompts(pipe, settings.prompts, **_reading(settings))
    if settings.long_prompts or not all(text.is_plain for text in (*read.prompts, read.negative)):
        return generate_cells(pipe, settings, [(prompt, seed, None) for prompt, seed in jobs], on_step=on_step)
    words = dict(zip(settings.prompts, read.prompts))
    images: list[Image.Image] = []
    for start in range(0, len(jobs), settings.batch_size):
        batch = jobs[start : start + settings.batch_size]
        given = {"prompt": [words[prompt].text for prompt, _ in batch]}
        if read.negative.text:
            given["negative_prompt"] = [read.negative.text] * len(batch)
        images += sample(pipe, settings, [seed for _, seed in batch], given, on_step=on_step)
    return images


def generate_cells(
    pipe: Any,
    settings: DrawSettings,
    cells: Sequence[Cell],
    *,
    on_step: Callable[[int], None] | None = None,
    strict: bool = True,
) -> list[Image.Image]:
    """One image a cell, each prompt encoded under its own stack; a batch holds prompts of equal length only.

    ``strict`` is as in :func:`~texforce_hub.apply.applied.apply_adapter`.

    Raises:
        ConfigError: a stack that changes the U-Net, which all images of a batch share.
        PromptError, RefError, FamilyError, MatchError: as ``encode_prompts``.
    """
    options: dict[str, Any] = {"clip_skip": settings.clip_skip} if settings.clip_skip is not None else {}
    images: dict[int, Image.Image] = {}
    for members in _batches(pipe, settings, [prompt for prompt, _, _ in cells]):
        prompts, seeds, stacks = zip(*(cells[i] for i in members))
        guided = settings.guidance > 1
        given = encode_prompts(pipe, prompts, stacks, guided=guided, strict=strict, **_reading(settings), **options)
        images |= zip(members, sample(pipe, settings, seeds, given, on_step=on_step))
    return [images[i] for i in range(len(cells))]


def _reading(settings: DrawSettings) -> dict[str, Any]:
    names = ("negative_prompt", "prompt_weights", "long_prompts")
    return {name: getattr(settings, name) for name in names}


def _batches(pipe: Any, settings: DrawSettings, prompts: Sequence[str]) -> Iterator[list[int]]:
    """Places of the prompts, as many as a batch holds, all of as many chunks: padding would change an image."""
    by_length: dict[int, list[int]] = {}
    lengths = {
        prompt: read_prompts(pipe, [prompt], **_reading(settings)).chunks if settings.long_prompts else 1
        for prompt in dict.fromkeys(prompts)
    }
    for index, prompt in enumerate(prompts):
        by_length.setdefault(lengths[prompt], []).append(index)
    for members in by_length.values():
        yield from (members[i : i + settings.batch_size] for i in range(0, len(members), settings.batch_size))


def sample(
    pipe: Any,
    settings: DrawSettings,
    seeds: Sequence[int],
    given: Mapping[str, Any],
    *,
    on_step: Callable[[int], None] | None = None,
    output_type: str = "pil",
    differentiable: bool = False,
) -> Any:
    """One call of the pipeline; ``given`` holds its prompts or embeddings. Each image has a generator of its own.

    Returns:
        A list of PIL images; with ``output_type`` ``"pt"`` a tensor ``(b, 3, h, w)`` in [0, 1], with its graph if
        ``differentiable``.

    Raises:
        ConfigError: something that the pipeline refuses, or a pipeline that draws without a gradient only.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    call = _undecorated(pipe) if differentiable else pipe
    optional = {"width": settings.width, "height": settings.height, "clip_skip": settings.clip_skip}
    keywords: dict[str, Any] = {name: value for name, value in optional.items() if value is not None}
    if unknown := sorted(set(keywords) - set(accepted)):
        raise ConfigError(f"{type(pipe).__name__} takes no {unknown[0]}")
    if "prompt_embeds" in given and "negative_prompt" in accepted:
        keywords["negative_prompt"] = None  # some pipelines have a default that clashes with embeddings

    def count(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(len(seeds))
        return values

    if "callback_on_step_end" in accepted:
        keywords["callback_on_step_end"] = count
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    steps: dict[str, Any] = {"num_inference_steps": settings.inference_steps, "guidance_scale": settings.guidance}
    steps["output_type"] = output_type
    try:
        with final_norms_named(pipe):
            result = call(**given, **keywords, **steps, generator=generators)
    except ValueError as error:
        raise ConfigError(f"{type(pipe).__name__}: {first_line(error)}") from error
    if blacked := sum(getattr(result, "nsfw_content_detected", None) or []):
        logger.warning("the base's safety checker blacked out %d of %d images", blacked, len(seeds))
    return result.images


def _undecorated(pipe: Any) -> Callable[..., Any]:
    """The pipeline's call without the ``torch.no_grad`` around it."""
    inner = getattr(type(pipe).__call__, "__wrapped__", None)
    if inner is None:
        raise ConfigError(f"{type(pipe).__name__}: its call cannot be differentiated")
    return partial(inner, pipe)
