"""``texforce-hub apply``: images with and without a stack of adapters."""

from pathlib import Path
from typing import Annotated

import typer

from texforce_hub.cli.console import put, say


def register(app: typer.Typer) -> None:
    """Add ``apply``."""
    app.command("apply")(apply)


def apply(
    output: Annotated[Path, typer.Option("--output", help="Folder for the images and the sheet.")],
    base: Annotated[str, typer.Option("--base", help="shapes, a folder, a checkpoint file, or a Hub id.")] = "shapes",
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="PATH, name or Hub id, with :WEIGHT; repeat to stack.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to draw; repeat for more.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A text file, one prompt a line.")] = None,
    unet: Annotated[
        str | None, typer.Option("--unet", help="A fine-tuned U-Net, or a U-Net LoRA with :WEIGHT.")
    ] = None,
    negative_prompt: Annotated[str, typer.Option("--negative-prompt")] = "",
    inference_steps: Annotated[int | None, typer.Option("--inference-steps", min=1)] = None,
    guidance: Annotated[float | None, typer.Option("--guidance")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Image i of a prompt has seed SEED + i.")] = 0,
    width: Annotated[int | None, typer.Option("--width")] = None,
    height: Annotated[int | None, typer.Option("--height")] = None,
    num_images: Annotated[int, typer.Option("--num-images", min=1, help="For each prompt.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    clip_skip: Annotated[int | None, typer.Option("--clip-skip", min=0)] = None,
    device: Annotated[str | None, typer.Option("--device", help="Default: CUDA if present.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32 (default), float16 or bfloat16.")] = None,
    mode: Annotated[str, typer.Option("--mode", help="attach or fuse.")] = "attach",
) -> None:
    """Draw prompts with and without a stack of adapters, at the same seeds."""
    from texforce_hub.cli.drawing import draw, read_prompts
    from texforce_hub.generate import Settings
    from texforce_hub.pipelines import load_pipeline
    from texforce_hub.shapes import GUIDANCE, INFERENCE_STEPS

    own = base == "shapes"
    settings = Settings(
        prompts=read_prompts(prompt or [], prompts),
        negative=negative_prompt,
        inference_steps=inference_steps or (INFERENCE_STEPS if own else 30),
        guidance=guidance if guidance is not None else (GUIDANCE if own else 7.5),
        seed=seed, width=width, height=height, num_images=num_images,
        batch_size=batch_size, clip_skip=clip_skip,
    )
    pipe = load_pipeline(base, unet=unet, device=device, dtype=dtype)
    paths = draw(pipe, adapter or [], settings, output, mode=mode, origin={"base": base, "unet": unet})
    say(f"{len(paths)} files in {output}")
    put(str(paths[-1]))
