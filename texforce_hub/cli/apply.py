"""``texforce-hub apply``: images with and without a stack of adapters, and the stack taken away to other tools."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from texforce_hub.cli.console import put, put_json
from texforce_hub.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add ``apply``."""
    app.command("apply")(apply)


def apply(
    context: typer.Context,
    output: Annotated[Path | None, typer.Option("--output", help="Folder for the images and the sheet.")] = None,
    base: Annotated[str, typer.Option("--base", help="shapes, a folder, a checkpoint file, or a Hub id.")] = "shapes",
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="PATH, name or Hub id, with :WEIGHT; repeat to stack.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What to draw, <lora:NAME:WEIGHT> tags in it too; repeatable.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A text file, one prompt a line.")] = None,
    adapter_dir: Annotated[
        Path | None, typer.Option("--adapter-dir", help="Where to look up the names in tags; default: the catalogue.")
    ] = None,
    prompt_weights: Annotated[
        str, typer.Option("--prompt-weights", help="A1111's (word:1.2): auto (if a number is in it), on or off.")
    ] = "auto",
    long_prompts: Annotated[
        bool, typer.Option("--long-prompts", help="Read prompts beyond the text encoder's length whole.")
    ] = False,
    unet: Annotated[str | None, typer.Option("--unet", help="A tuned U-Net, or a U-Net LoRA with :WEIGHT.")] = None,
    each: Annotated[bool, typer.Option("--each", help="One column for each adapter, all in one batch.")] = False,
    sweep: Annotated[str, typer.Option("--sweep", help="NAME=FROM:TO:COUNT, a column for each weight.")] = "",
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", help="What not to draw.")] = None,
    inference_steps: Annotated[int | None, typer.Option("--inference-steps", min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Classifier-free guidance scale.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Image i of a prompt has seed SEED + i.")] = 0,
    width: Annotated[int | None, typer.Option("--width", help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option("--height", help="Pixels.")] = None,
    scheduler: Annotated[str, typer.Option("--scheduler", help="ddim, euler, euler-a, dpm++, lcm …")] = "",
    num_images: Annotated[int, typer.Option("--num-images", min=1, help="For each prompt.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch", min=1, help="Images drawn at once.")] = 8,
    clip_skip: Annotated[int | None, typer.Option("--clip-skip", min=0, help="Last CLIP layers to skip.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Default: CUDA if present.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32 (default), float16 or bfloat16.")] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Keep models in main memory between uses.")] = False,
    mode: Annotated[str, typer.Option("--mode", help="attach or fuse.")] = "attach",
    rounding: Annotated[
        str, typer.Option("--rounding", help="Of fused half-precision weights: nearest or stochastic (by --seed).")
    ] = "nearest",
    save_recipe: Annotated[Path | None, typer.Option("--save-recipe", help="Write what was done, with hashes.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Do again what a recipe says.")] = None,
    pipeline: Annotated[Path | None, typer.Option("--save-pipeline", help="Folder: all of it, stack baked in.")] = None,
    portable: Annotated[bool, typer.Option("--portable", help="With --save-pipeline: for transformers 4 too.")] = False,
    checkpoint: Annotated[Path | None, typer.Option("--save-checkpoint", help="One file, stack baked in.")] = None,
    text_encoder: Annotated[Path | None, typer.Option("--save-text-encoder", help="For ComfyUI's CLIP loader.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the files written as JSON.")] = False,
) -> None:
    """Draw prompts with and without a stack of adapters, at the same seeds; or bake the stack in and save it."""
    from texforce_hub.generate.draw import DrawSettings
    from texforce_hub.generate.prompts.adapter_index import AdapterIndex
    from texforce_hub.generate.prompts.sets import gather_prompts
    from texforce_hub.generate.recipe import DrawRun, record_run, replay_run
    from texforce_hub.generate.run import Drawing
    from texforce_hub.hub.refs.adapter import AdapterRef
    from texforce_hub.shapes import GUIDANCE, INFERENCE_STEPS

    saves = {"pipeline": pipeline, "checkpoint": checkpoint, "text_encoder": text_encoder}
    if output is None and not any(saves.values()):
        raise ConfigError("nothing to write: give --output DIR, or one of the --save options")
    if rounding == "stochastic" and mode == "attach" and not any(saves.values()):
        raise ConfigError("--rounding stochastic rounds fused weights; give --mode fuse too, or leave it out")
    if portable and pipeline is None:
        raise ConfigError("--portable says how --save-pipeline saves; give that too, or leave it out")
    if recipe is not None:
        _refuse_beside_recipe(context)
        run = replay_run(recipe)
    else:
        own = base == "shapes"
        given = gather_prompts(prompt or [], prompts) if prompt or prompts or output is not None else ("nothing",)
        index = AdapterIndex(adapter_dir)
        settings = DrawSettings(
            prompts=given,
            negative_prompt=negative_prompt or "",
            inference_steps=inference_steps or (INFERENCE_STEPS if own else 30),
            guidance=guidance if guidance is not None else (GUIDANCE if own else 7.5),
            seed=seed,
            width=width,
            height=height,
            num_images=num_images,
            batch_size=batch_size,
            clip_skip=clip_skip,
            prompt_weights=prompt_weights,
            long_prompts=long_prompts,
        )
        refs = tuple(AdapterRef.parse(text) for text in adapter or [])
        run = DrawRun(
            base,
            refs,
            settings,
            unet=unet or "",
            mode=mode,
            rounding=rounding,
            scheduler=scheduler,
            each=each,
            sweep=sweep,
            tags=index.find_all(given),
        )
    if run.tags and any(saves.values()):
        raise ConfigError("a model is saved for all prompts, a tag acts on its own; give its adapter with --adapter")
    drawing = Drawing(run)
    drawing.load(device=device, dtype=dtype, offload=offload)
    files = drawing.draw(output) if output is not None else []
    files += drawing.save(saves, portable=portable)
    if save_recipe is not None:
        record_run(run, save_recipe)
        files.append(save_recipe)
    print_files(files, as_json=as_json)


_BESIDE_RECIPE = {"output", "recipe", "device", "dtype", "offload", "as_json", "save_recipe"}
_BESIDE_RECIPE |= {"pipeline", "portable", "checkpoint", "text_encoder"}


def _refuse_beside_recipe(context: typer.Context) -> None:
    """A recipe says how images are made: an option that would say something else is refused, not ignored."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in _BESIDE_RECIPE and source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"{parameter.opts[0]} beside --recipe: the recipe says it already; leave one of them out")


def print_files(files: Sequence[Path], *, as_json: bool) -> None:
    """The files written, one a line, or as JSON."""
    if as_json:
        put_json({"files": [str(path) for path in files]})
    else:
        for path in files:
            put(str(path))
