"""Drive a pipeline: prompts in, images with their origin out."""

import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from texforce_hub.conditioning import final_norms_named
from texforce_hub.errors import ConfigError, PromptError
from texforce_hub.files import writing
from texforce_hub.images.png import a1111_parameters, encode_png

logger = logging.getLogger("texforce_hub")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to sample. Image ``i`` of a prompt has seed ``seed + i``, whatever the batch size."""

    prompts: tuple[str, ...]
    negative: str = ""
    inference_steps: int = 30
    guidance: float = 7.5
    seed: int = 0
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    batch_size: int = 8
    clip_skip: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise PromptError("an empty prompt; expected at least one word")
        for name in ("inference_steps", "num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")

    def jobs(self) -> list[tuple[str, int]]:
        """Prompt and seed of every image, prompt by prompt."""
        return [(prompt, self.seed + i) for prompt in self.prompts for i in range(self.num_images)]


def generate_images(pipe: Any, settings: Settings, *, on_step: Callable[[], None] | None = None) -> list[Image.Image]:
    """One image a job, in the jobs' order; ``on_step`` is called after each denoising step of a batch."""
    jobs = settings.jobs()
    images: list[Image.Image] = []
    for start in range(0, len(jobs), settings.batch_size):
        batch = jobs[start : start + settings.batch_size]
        given = {"prompt": [prompt for prompt, _ in batch]}
        if settings.negative:
            given["negative_prompt"] = [settings.negative] * len(batch)
        images += sample(pipe, settings, [seed for _, seed in batch], given, on_step=on_step)
    return images


def sample(
    pipe: Any,
    settings: Settings,
    seeds: Sequence[int],
    given: Mapping[str, Any],
    *,
    on_step: Callable[[], None] | None = None,
) -> list[Image.Image]:
    """One call of the pipeline; ``given`` holds its prompts or embeddings. Each image has a generator of its own."""
    accepted = inspect.signature(pipe.__call__).parameters
    optional = {"width": settings.width, "height": settings.height, "clip_skip": settings.clip_skip}
    keywords: dict[str, Any] = {name: value for name, value in optional.items() if value is not None}
    if unknown := sorted(set(keywords) - set(accepted)):
        raise ConfigError(f"{type(pipe).__name__} takes no {unknown[0]}")
    if "prompt_embeds" in given and "negative_prompt" in accepted:
        keywords["negative_prompt"] = None  # some pipelines have a default that clashes with embeddings

    def count(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step()
        return values

    if "callback_on_step_end" in accepted:
        keywords["callback_on_step_end"] = count
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    steps = {"num_inference_steps": settings.inference_steps, "guidance_scale": settings.guidance}
    try:
        with final_norms_named(pipe):
            result = pipe(**given, **keywords, **steps, generator=generators)
    except ValueError as error:
        raise ConfigError(f"{type(pipe).__name__}: {(str(error).splitlines() or ['?'])[0]}") from error
    if blacked := sum(getattr(result, "nsfw_content_detected", None) or []):
        logger.warning("the base's safety checker blacked out %d of %d images", blacked, len(seeds))
    return list(result.images)


def save_images(
    images: Sequence[Image.Image], settings: Settings, folder: Path, *, sampler: str, origin: Mapping[str, Any]
) -> list[Path]:
    """Write the images of a run as numbered PNG files whose text says how each was made."""
    paths = []
    for number, (image, (prompt, seed)) in enumerate(zip(images, settings.jobs(), strict=True)):
        path = folder / f"{number:04d}.png"
        with writing(path) as temporary:
            Path(temporary).write_bytes(encode_png(image, describe(image, settings, prompt, seed, sampler, origin)))
        paths.append(path)
    return paths


def describe(
    image: Image.Image, settings: Settings, prompt: str, seed: int, sampler: str, origin: Mapping[str, Any]
) -> dict[str, str]:
    """The text entries of one image: A1111's ``parameters``, and everything in ``texforce_hub``."""
    parameters = a1111_parameters(
        prompt,
        settings.negative,
        steps=settings.inference_steps,
        sampler=sampler,
        guidance=settings.guidance,
        seed=seed,
        size=image.size,
    )
    whole = {"prompt": prompt, "seed": seed, **origin, "settings": asdict(settings)}
    return {"parameters": parameters, "texforce_hub": json.dumps(whole, ensure_ascii=False, default=str)}
