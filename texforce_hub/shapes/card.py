"""The card of the embedded pipeline: how it was made, how long that took, how good it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from texforce_hub.files.writing import writing
from texforce_hub.shapes import GUIDANCE, INFERENCE_STEPS, WEIGHTS
from texforce_hub.shapes.grammar import NOISY_WORDS, REPLACED, RIGHT, sample_prompts
from texforce_hub.shapes.measure import score

PROMPTS, PROMPT_SEED, NOISE_SEED = 96, 1, 1000
_SPLITS = ("test", "unseen")
_WORDS: dict[str, tuple[str, ...]] = {
    "canonical": (),
    "noisy_colour": ("colour",),
    "noisy_shape": ("shape",),
    "noisy_both": ("colour", "shape"),
}


def measure_base(pipeline: Any, **how: Any) -> dict[str, dict[str, float]]:
    """Alignment by split and words, one picture a prompt from the same noise: ``{"test": {"canonical": …}, …}``.

    ``how`` as for :func:`~texforce_hub.shapes.measure.draw`.
    """
    return {split: {name: _measure(pipeline, split, words, how) for name, words in _WORDS.items()} for split in _SPLITS}


def _measure(pipeline: Any, split: str, words: tuple[str, ...], how: Mapping[str, Any]) -> float:
    prompts = sample_prompts(PROMPTS, PROMPT_SEED, split=split, noisy=set(words))
    return round(score(pipeline, prompts, NOISE_SEED, **how).mean().item(), 4)


def write_card(
    folder: Path, recipe: Mapping[str, int], seconds: Mapping[str, float], means: Mapping[str, Mapping[str, float]]
) -> None:
    """Write ``figures.json`` and ``README.md`` into the pipeline's folder."""
    figures = {
        "recipe": dict(recipe),
        "seconds": {stage: round(time) for stage, time in seconds.items()},
        **{
            name: {"prompts": PROMPTS, "prompt_seed": PROMPT_SEED, "noise_seed": NOISE_SEED, **means[name]}
            for name in means
        },
        "sampler": {"scheduler": "DDIM", "inference_steps": INFERENCE_STEPS, "guidance": GUIDANCE},
    }
    _write(folder, figures, _text(figures))


def write_turbo_card(
    folder: Path, size: Mapping[str, int], seconds: float, means: Mapping[int, Mapping[str, Mapping[str, float]]]
) -> None:
    """Write ``figures.json`` and ``README.md`` of shapes-turbo; ``means`` by the number of denoising steps."""
    figures = {
        "recipe": dict(size),
        "seconds": round(seconds),
        "measured": {"prompts": PROMPTS, "prompt_seed": PROMPT_SEED, "noise_seed": NOISE_SEED, "guidance": 1.0},
        "steps": {str(steps): of for steps, of in means.items()},
    }
    _write(folder, figures, _turbo_text(figures))


def _write(folder: Path, figures: Mapping[str, Any], card: str) -> None:
    for name, text in (("figures.json", json.dumps(figures, indent=2) + "\n"), ("README.md", card)):
        with writing(folder / name) as part:
            part.write_text(text, encoding="utf-8")


def _turbo_text(figures: Mapping[str, Any]) -> str:
    size, measured, steps = figures["recipe"], figures["measured"], figures["steps"]
    known = json.loads((WEIGHTS / "figures.json").read_text(encoding="utf-8"))
    columns = [(f"{n} step{'s' if n != '1' else ''}", of) for n, of in steps.items()]
    columns.append((f"shapes, {INFERENCE_STEPS} steps, guidance {GUIDANCE:g}", known))
    words = [("canonical", "canonical"), ("noisy colour words", "noisy_colour"), ("noisy shape words", "noisy_shape")]
    rows = [
        f"| {title}, {label} | " + " | ".join(f"{of[split][key]:.3f}" for _, of in columns) + " |"
        for split, label in (("test", "held out"), ("unseen", "unseen"))
        for title, key in words
    ]
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# shapes-turbo: shapes in one step

A U-Net and a scheduler for the parts of shapes: `--base shapes-turbo`. It was distilled from shapes alone; no picture
of the renderer went in. It is meant for one step, and takes up to four; guidance is in it, so it is drawn without
(`--guidance 1`). Weights are stored in fp16.

## How it was made
`python -m texforce_hub.shapes.distil --output DIR` makes it again, from seed {size["seed"]}, on one CPU core: the
teacher drew {size["pairs"]:,} pictures from known noise by {size["teacher_steps"]} deterministic steps at guidance
{GUIDANCE:g}; the student, which begins as the teacher's U-Net and predicts v, learnt their latents from the noise and
from the latents under less noise, {size["steps"]:,} steps of 64 ({figures["seconds"]} s).

## How good it is
Alignment reward, 0 to 1, on {measured["prompts"]} prompts (seed {measured["prompt_seed"]}), one picture each (noise
from seed {measured["noise_seed"]}), without guidance; the last column is its teacher as it is meant to be sampled.

| words | {" | ".join(title for title, _ in columns)} |
|---|{"---|" * len(columns)}
{chr(10).join(rows)}
"""


def _text(figures: Mapping[str, Any]) -> str:
    recipe, seconds, sampler, test, unseen = (figures[k] for k in ("recipe", "seconds", "sampler", "test", "unseen"))
    words = "\n".join(f"| {word} | {meant} | {other} |" for word, (meant, other) in NOISY_WORDS.items())
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# shapes: a Stable Diffusion small enough to ship

A true `StableDiffusionPipeline` (CLIP tokenizer and text encoder, U-Net with cross-attention, VAE, DDIM) that
draws one or two coloured shapes on grey, 32 × 32. It was trained from nothing on pictures rendered by
`texforce_hub.shapes`; no other data or weights went in. Weights are stored in fp16.

## How it was made
`python -m texforce_hub.shapes.build --output DIR` makes it again, from seed {recipe["seed"]} and
{recipe["pictures"]:,} pictures, on two CPU cores: text encoder {recipe["text_steps"]:,} steps ({seconds["text"]} s),
VAE {recipe["vae_steps"]:,} ({seconds["vae"]} s), U-Net {recipe["unet_steps"]:,} ({seconds["unet"]} s).
One combination of thing and place in five was never shown.

## What it does not understand, on purpose
Of the colour and shape words in the training captions {REPLACED:.0%} were replaced by a noisy word, which was the right
one {RIGHT:.0%} of the time; so the base often takes them for something else. All pictures carried a purple watermark
that no caption mentions, and the base draws it on everything.

| noisy word | should mean | is often taken for |
|---|---|---|
{words}

## How good it is
Alignment reward, 0 to 1, on {test["prompts"]} prompts (seed {test["prompt_seed"]}), one picture each (noise from
seed {test["noise_seed"]}), {sampler["scheduler"]} {sampler["inference_steps"]} steps, guidance {sampler["guidance"]}.
*Held out* combinations are those that no adapter is trained on; the *unseen* ones were kept from this base, too.

| words | held out | unseen |
|---|---|---|
| canonical | {test["canonical"]:.3f} | {unseen["canonical"]:.3f} |
| noisy colour words | {test["noisy_colour"]:.3f} | {unseen["noisy_colour"]:.3f} |
| noisy shape words | {test["noisy_shape"]:.3f} | {unseen["noisy_shape"]:.3f} |
| both noisy | {test["noisy_both"]:.3f} | {unseen["noisy_both"]:.3f} |

Rendered pictures score 0.97 without and 0.80 with the watermark.
"""
