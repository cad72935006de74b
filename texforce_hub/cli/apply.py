"""``texforce-hub apply``: images with and without a stack of adapters, and the stack taken away to other tools."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli import names, options
from texforce_hub.cli.console import LOUDNESS, put, put_json
from texforce_hub.cli.options import RESULT, SAMPLING, WORK, option, refuse_existing
from texforce_hub.cli.progress import bars
from texforce_hub.cli.summary import MOST, count_of
from texforce_hub.cli.table import put_table
from texforce_hub.errors import ConfigError
from texforce_hub.generate.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from texforce_hub.generate.recipe import DrawRun

_STACK, _PROMPTS, _SAVE = "Adapters and columns", "Prompts", "The base with the stack baked in"


def register(app: typer.Typer) -> None:
    """Add ``apply``."""
    app.command("apply")(apply)


def apply(
    context: typer.Context,
    adapter: Annotated[
        list[str] | None,
        option("--adapter", metavar="REF", help="PATH, name or Hub id, with :WEIGHT; repeat to stack.", group=_STACK,
               autocompletion=names.refs),
    ] = None,
    each: Annotated[bool, option("--each", help="One column for each adapter.", group=_STACK)] = False,
    sweep: Annotated[
        list[str] | None,
        option("--sweep", metavar="NAME=…", help="0:1:5 or A,B,C of an adapter, seed, steps …; up to 3.",
               group=_STACK),
    ] = None,
    mode: Annotated[str, option("--mode", metavar="HOW", help="attach (default) or fuse.", group=_STACK)] = "attach",
    rounding: Annotated[
        str, option("--rounding", metavar="HOW", help="Of fused half floats: nearest or stochastic.", group=_STACK)
    ] = "nearest",
    composite: Annotated[
        str, option("--composite", metavar="HOW", help="Not added: average or switch, each alone.", group=_STACK)
    ] = "",
    strict: options.Strict = True,
    prompt: Annotated[
        list[str] | None,
        option("--prompt", metavar="TEXT", help="What to draw, with <lora:NAME:WEIGHT> too.", group=_PROMPTS),
    ] = None,
    prompts: Annotated[
        str | None,
        option("--prompts", metavar="LIST", help="A prompt a line; or FILE.csv:COLUMN, hub:NAME …", group=_PROMPTS),
    ] = None,
    adapter_dir: Annotated[
        Path | None, option("--adapter-dir", metavar="DIR", help="Where names in tags are; default: the catalogue.",
                            group=_PROMPTS)
    ] = None,
    prompt_weights: Annotated[
        str, option("--prompt-weights", metavar="HOW", help="A1111's (word:1.2): auto, on or off.", group=_PROMPTS)
    ] = "auto",
    long_prompts: Annotated[
        bool, option("--long-prompts", help="Read prompts beyond the text encoder's length whole.", group=_PROMPTS)
    ] = False,
    negative_prompt: options.NegativePrompt = None,
    inference_steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    num_images: Annotated[
        int, option("--num-images", metavar="N", min=1, max=10_000, help="For each prompt.", group=SAMPLING)
    ] = 1,
    width: Annotated[int | None, option("--width", metavar="N", min=8, help="Pixels.", group=SAMPLING)] = None,
    height: Annotated[int | None, option("--height", metavar="N", min=8, help="Pixels.", group=SAMPLING)] = None,
    scheduler: Annotated[
        str, option("--scheduler", metavar="NAME", help="ddim, euler_a, dpmpp_2m …", group=SAMPLING,
                    autocompletion=names.schedulers)
    ] = "",
    list_schedulers: Annotated[
        bool, option("--list-schedulers", help="Show the schedulers and stop.", group=SAMPLING)
    ] = False,
    clip_skip: Annotated[
        int | None, option("--clip-skip", metavar="N", min=0, help="Last CLIP layers to skip.", group=SAMPLING)
    ] = None,
    batch_size: options.BatchSize = 8,
    base: options.Base = "shapes",
    unet: options.Unet = None,
    lock: options.LockFile = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    offload: Annotated[bool, option("--offload", help="Keep models in main memory between uses.", group=WORK)] = False,
    pipeline: Annotated[
        Path | None, option("--save-pipeline", metavar="DIR", help="As a pipeline's folder.", group=_SAVE)
    ] = None,
    portable: Annotated[bool, option("--portable", help="That folder for transformers 4 too.", group=_SAVE)] = False,
    checkpoint: Annotated[
        Path | None, option("--save-checkpoint", metavar="FILE", help="As one file.", group=_SAVE)
    ] = None,
    text_encoder: Annotated[
        Path | None, option("--save-text-encoder", metavar="FILE", help="For ComfyUI's CLIP loader.", group=_SAVE)
    ] = None,
    output: Annotated[
        Path | None, option("--output", "-o", metavar="DIR", help="Folder for the images and the sheet.", group=RESULT)
    ] = None,
    save_recipe: Annotated[
        Path | None, option("--save-recipe", metavar="FILE", help="Write what was done, with hashes.", group=RESULT)
    ] = None,
    recipe: Annotated[
        Path | None, option("--recipe", metavar="FILE", help="Do again what a recipe says.", group=RESULT)
    ] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Draw prompts with and without a stack, at equal seeds; or save it baked in."""
    del lock  # in use since it was read
    given = dict(locals())
    if list_schedulers:
        _print_schedulers(as_json=as_json)
        return
    from texforce_hub.generate.recipe import record_run, replay_run
    from texforce_hub.generate.results import check_folder
    from texforce_hub.generate.run import Drawing

    targets = {"pipeline": pipeline, "checkpoint": checkpoint, "text_encoder": text_encoder}
    _check_targets(output, targets, mode=mode, rounding=rounding, portable=portable, force=force)
    if output is not None:
        check_folder(output, force=force)
    if save_recipe is not None:
        refuse_existing(save_recipe, force=force)
    if recipe is not None:
        _refuse_beside_recipe(context)
        run = replay_run(recipe)
    else:
        run = _make_run(given)
    if run.tags and any(targets.values()):
        raise ConfigError("a model is saved for all prompts, a tag acts on its own; give its adapter with --adapter")
    if run.composite and any(targets.values()):
        raise ConfigError("--composite acts while pictures are drawn; leave it out, or save nothing")
    drawing = Drawing(run)
    drawing.load(device=device, dtype=dtype, offload=offload)
    files: list[Path] = []
    if output is not None:
        with bars({"drawing": drawing.steps}) as advance:
            files += drawing.draw(output, force=force, on_step=lambda count: advance("drawing", count))
    files += drawing.save(targets, portable=portable)
    if save_recipe is not None:
        record_run(run, save_recipe)
        files.append(save_recipe)
    print_files(files, as_json=as_json)


def _make_run(given: dict[str, Any]) -> "DrawRun":
    """The run that the options describe; every prompt, tag and reference is read."""
    from texforce_hub.generate.draw import DrawSettings
    from texforce_hub.generate.prompts.adapter_index import AdapterIndex
    from texforce_hub.generate.prompts.sets import gather_prompts
    from texforce_hub.generate.recipe import DrawRun
    from texforce_hub.hub.refs.adapter import AdapterRef
    from texforce_hub.shapes import SHAPES

    steps, guidance = SHAPES.get(given["base"], (30, 7.5))
    asked = given["prompt"] or given["prompts"] or given["output"] is not None
    prompts = gather_prompts(given["prompt"] or [], given["prompts"]) if asked else ("nothing",)
    same = ("seed", "width", "height", "num_images", "batch_size", "clip_skip", "prompt_weights", "long_prompts")
    settings = DrawSettings(
        prompts=prompts,
        negative_prompt=given["negative_prompt"] or "",
        inference_steps=given["inference_steps"] or steps,
        guidance=given["guidance"] if given["guidance"] is not None else guidance,
        **{name: given[name] for name in same},
    )
    return DrawRun(
        given["base"],
        tuple(AdapterRef.parse(text) for text in given["adapter"] or []),
        settings,
        unet=given["unet"] or "",
        sweeps=tuple(given["sweep"] or ()),
        tags=AdapterIndex(given["adapter_dir"]).find_all(prompts),
        **{name: given[name] for name in ("mode", "rounding", "strict", "scheduler", "each", "composite")},
    )


def _check_targets(
    output: Path | None, targets: dict[str, Path | None], *, mode: str, rounding: str, portable: bool, force: bool
) -> None:
    """Refuse options that would do nothing, and outputs that are there already."""
    saves = [path for path in targets.values() if path is not None]
    if output is None and not saves:
        raise ConfigError("nothing to write: give --output DIR, or one of the --save options")
    if mode not in ("attach", "fuse"):
        raise ConfigError(f"--mode {mode!r}; expected attach or fuse")
    if rounding == "stochastic" and mode == "attach" and not saves:
        raise ConfigError("--rounding stochastic rounds fused weights; give --mode fuse too, or leave it out")
    if portable and targets["pipeline"] is None:
        raise ConfigError("--portable says how --save-pipeline saves; give that too, or leave it out")
    for path in saves:
        refuse_existing(path, force=force)


_BESIDE_RECIPE = {"output", "recipe", "device", "dtype", "offload", "as_json", "save_recipe", "force"}
_BESIDE_RECIPE |= {"pipeline", "portable", "checkpoint", "text_encoder", "verbose", "quiet"}


def _refuse_beside_recipe(context: typer.Context) -> None:
    """A recipe says how images are made: an option that would say something else is refused, not ignored."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in _BESIDE_RECIPE and source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"{parameter.opts[0]} beside --recipe: the recipe says it already; leave one of them out")


def _print_schedulers(*, as_json: bool) -> None:
    if as_json:
        put_json({name: {"class": kind, "changes": changes} for name, (kind, changes) in SCHEDULERS.items()})
        return
    rows = [
        [name, kind, ", ".join(f"{k}={v}" for k, v in changes.items())] for name, (kind, changes) in SCHEDULERS.items()
    ]
    put_table(["scheduler", "class in diffusers", "settings"], rows)


def print_files(files: Sequence[Path], *, as_json: bool) -> None:
    """The files written: of many pictures in one folder the folder and their number; all of them with -v or as JSON."""
    if as_json:
        put_json({"files": [str(path) for path in files]})
        return
    folders: dict[Path, list[Path]] = {}
    for path in files:
        folders.setdefault(path.parent if path.name[:4].isdigit() else path, []).append(path)
    many = len(folders) > MOST and not LOUDNESS.verbose
    if many:
        pictures = [path for path in files if path.name[:4].isdigit()]
        put(f"{pictures[0].parents[1]}: {count_of(len(pictures), 'picture')} in {count_of(len(folders) - 1, 'folder')}")
        folders = {folder: paths for folder, paths in folders.items() if folder in files}
    for folder, paths in folders.items():
        if len(paths) > 1 and not LOUDNESS.verbose:
            put(f"{folder}: {count_of(len(paths), 'picture')}")
        else:
            for path in paths:
                put(str(path))
