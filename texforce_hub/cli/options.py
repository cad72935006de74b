"""Options that several commands share, each spelled once, and what is asked of their values."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli import names
from texforce_hub.errors import ConfigError, FileError

if TYPE_CHECKING:
    from texforce_hub.evaluate.evaluation import Sampling

WORK, RESULT, SAMPLING = "Where it is computed", "Result", "Sampling"
MEASURED = "What is measured"
"""Groups of options in --help."""
LARGEST_SEED, MOST_SEEDS = 2**31 - 1, 1000
"""Of commands that measure on several seeds."""


def option(*spelled: str, help: str, group: str, **settings: Any) -> Any:
    """An option of a group, whose help says its default in words."""
    return typer.Option(*spelled, help=help, rich_help_panel=group, show_default=False, **settings)


Ref = Annotated[str, typer.Argument(metavar="REF", help="A file, folder, name or Hub id.", autocompletion=names.refs)]
Refs = Annotated[
    list[str],
    typer.Argument(metavar="REF…", help="Files, folders, names, Hub ids.", autocompletion=names.refs),
]
Output = Annotated[Path, option("--output", "-o", metavar="PATH", help="File or folder for the result.", group=RESULT)]
Force = Annotated[bool, option("--force", help="Write over what is there.", group=RESULT)]
Yes = Annotated[bool, option("--yes", help="Install what a reward env:… needs, without a question.", group=WORK)]
AsJson = Annotated[bool, option("--json", help="Print one JSON object.", group=RESULT)]
Dialect = Annotated[
    str,
    option(
        "--dialect", metavar="NAME", help="Layout: diffusers (default), kohya or peft.", group=RESULT,
        autocompletion=names.writable_dialects,
    ),
]  # fmt: skip
Device = Annotated[
    str | None,
    option("--device", metavar="NAME", help="cpu, cuda, cuda:1 …; default: CUDA if present.", group=WORK),
]
Dtype = Annotated[
    str | None,
    option(
        "--dtype", metavar="NAME", help="fp32 (default), fp16 or bf16.", group=WORK, autocompletion=names.dtypes
    ),
]  # fmt: skip
Base = Annotated[
    str,
    option(
        "--base", metavar="BASE", help="shapes (default), shapes-turbo, a folder, a file, a Hub id.", group=WORK,
        autocompletion=names.bases,
    ),
]  # fmt: skip
DoraBase = Annotated[
    str | None,
    option(
        "--base", metavar="BASE", help="Needed only by DoRA layers.", group=WORK, autocompletion=names.bases
    ),
]  # fmt: skip
Unet = Annotated[
    str | None,
    option("--unet", metavar="REF", help="A tuned U-Net, or a U-Net LoRA with :WEIGHT.", group=WORK),
]
Rank = Annotated[int | None, option("--rank", metavar="N", min=1, help="Largest rank of a layer.", group=RESULT)]
Energy = Annotated[
    float | None,
    option("--energy", metavar="SHARE", help="Share to keep of each layer, e.g. 0.99.", group=RESULT),
]
TotalRank = Annotated[
    int | None,
    option("--max-total-rank", metavar="N", min=1, help="Sum of all ranks, spent where it keeps most.", group=RESULT),
]
NegativePrompt = Annotated[
    str | None, option("--negative-prompt", metavar="TEXT", help="What guidance steers away from.", group=SAMPLING)
]
BatchSize = Annotated[
    int,
    option("--batch-size", "--batch", metavar="N", min=1, help="Pictures at once; fewer if memory runs out.",
           group=SAMPLING),
]  # fmt: skip
Steps = Annotated[
    int | None,
    option("--inference-steps", "--steps", metavar="N", min=1, max=1000, help="Denoising steps.", group=SAMPLING),
]
Guidance = Annotated[
    float | None, option("--guidance", metavar="X", help="Classifier-free guidance scale.", group=SAMPLING)
]
Rewards = Annotated[
    list[str] | None,
    option("--reward", metavar="NAME", help="NAME[=WEIGHT], python:module:function …; repeatable.", group=MEASURED,
           autocompletion=names.rewards),
]  # fmt: skip
Prompts = Annotated[
    str,
    option("--prompts", metavar="LIST", help="A prompt a line; FILE.csv:COLUMN, hub:NAME, shapes:colour …",
           group=MEASURED),
]  # fmt: skip
Seeds = Annotated[
    int, option("--seeds", metavar="N", min=1, max=MOST_SEEDS, help="Pictures of every prompt.", group=SAMPLING)
]
FirstSeed = Annotated[
    int, option("--seed", metavar="N", min=0, max=LARGEST_SEED, help="The first seed of the noise.", group=SAMPLING)
]
Strict = Annotated[
    bool,
    option("--strict/--no-strict", help="Refuse a layer that the base lacks, or leave it out.", group=WORK),
]
Seed = Annotated[
    int,
    option("--seed", metavar="N", min=0, max=2**63 - 1, help="Image i of a prompt has seed N + i.", group=SAMPLING),
]


def _take_lock(context: typer.Context, path: Path | None) -> Path | None:
    """Let references to the Hub mean, for the rest of the command, what a lock pins."""
    if path is not None:
        from texforce_hub.hub.lock import use_lock

        context.with_resource(use_lock(path))
    return path


LockFile = Annotated[
    Path | None,
    option("--lock", metavar="FILE", help="Read what 'pull --lock' noted.", group=WORK,
           callback=_take_lock),
]  # fmt: skip


def make_sampling(
    seed: int,
    seeds: int,
    steps: int | None,
    guidance: float | None,
    negative_prompt: str | None,
    batch_size: int,
    *,
    base: str,
) -> "Sampling":
    """How commands that measure draw: 15 steps at guidance 5, or as a base that ships is meant, unless told."""
    from texforce_hub.evaluate.evaluation import Sampling
    from texforce_hub.shapes import SHAPES

    own_steps, own_guidance = SHAPES.get(base, SHAPES["shapes"])
    scale = own_guidance if guidance is None else guidance
    return Sampling(tuple(range(seed, seed + seeds)), steps or own_steps, scale, negative_prompt or "", batch_size)


def refuse_existing(output: Path, *, force: bool, inside: str = "") -> None:
    """Refuse to write over a file, or into a folder that holds something, unless that is wished.

    Args:
        inside: the file that would be written into the folder; what else is in it does not matter then.

    Raises:
        FileError: there is something.
    """
    if force:
        return
    if inside and output.is_dir():
        refuse_existing(output / inside, force=False)
    elif output.is_dir() and any(output.iterdir()):
        raise FileError(f"{output} is a folder that holds something; name another, or give --force to write into it")
    if output.is_file():
        raise FileError(f"{output} exists; name another file, or give --force to write over it")


def refuse_suffix(output: Path, suffixes: Sequence[str]) -> None:
    """Refuse an output whose name promises another kind of file.

    Raises:
        ConfigError: another suffix.
    """
    if output.suffix.lower() not in suffixes:
        raise ConfigError(f"--output {output}; expected a name that ends with {' or '.join(suffixes)}")


def load_base(base: str | None, *, device: Any = None) -> Any:
    """The pipeline that ``--base`` names; ``None`` without one.

    Raises:
        PipelineError: it is none, or cannot be found.
    """
    if base is None:
        return None
    from texforce_hub.pipelines.load import load_pipeline

    return load_pipeline(base, device=device)
