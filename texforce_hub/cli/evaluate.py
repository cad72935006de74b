"""``texforce-hub evaluate``: which adapter is better, with intervals."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli import names
from texforce_hub.cli.console import put_detail, put_json
from texforce_hub.cli.environments import prepare_rewards
from texforce_hub.cli.options import (
    LARGEST_SEED,
    MOST_SEEDS,
    SAMPLING,
    WORK,
    AsJson,
    Base,
    BatchSize,
    Device,
    Dtype,
    Guidance,
    LockFile,
    NegativePrompt,
    Steps,
    Unet,
    Yes,
    option,
)
from texforce_hub.cli.progress import bars
from texforce_hub.cli.table import put_table
from texforce_hub.rewards.built_in import BUILT_IN

if TYPE_CHECKING:
    from texforce_hub.evaluate.evaluation import Evaluation
    from texforce_hub.evaluate.variants import Variant


MEASURED = "What is measured"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(evaluate)


def evaluate(
    adapter: Annotated[
        list[str] | None,
        option("--adapter", metavar="STACK", help="What to compare with the base, 'A:0.8 + B'; repeatable.",
               group=WORK, autocompletion=names.refs),
    ] = None,
    base: Base = "shapes",
    unet: Unet = None,
    reward: Annotated[
        list[str] | None,
        option("--reward", metavar="NAME", help="A built-in, python:./file.py:function, or a server's address.",
               group=MEASURED, autocompletion=names.rewards),
    ] = None,
    list_rewards: Annotated[bool, option("--list-rewards", help="Show the rewards and stop.", group=MEASURED)] = False,
    prompts: Annotated[
        str,
        option("--prompts", metavar="LIST", help="A prompt a line; FILE.csv:COLUMN, hub:NAME, shapes:colour …",
               group=MEASURED),
    ] = "shapes:colour",
    seeds: Annotated[
        int, option("--seeds", metavar="N", min=1, max=MOST_SEEDS, help="Pictures of every prompt: 2.", group=SAMPLING)
    ] = 2,
    seed: Annotated[
        int, option("--seed", metavar="N", min=0, max=LARGEST_SEED, help="The first of them.", group=SAMPLING)
    ] = 0,
    inference_steps: Steps = None,
    guidance: Guidance = None,
    negative_prompt: NegativePrompt = None,
    batch_size: BatchSize = 64,
    lock: LockFile = None,
    device: Device = None,
    dtype: Dtype = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Score stacks on the same prompts and noise as the base; differences with 95 % intervals paired by prompt."""
    del lock  # in use since it was read
    if list_rewards:
        print_rewards(as_json=as_json)
        return
    prepare_rewards(reward or [], yes=yes)
    from texforce_hub.device import choose_device
    from texforce_hub.evaluate.evaluation import Sampling, describe
    from texforce_hub.evaluate.variants import evaluate_variants
    from texforce_hub.generate.prompts.sets import held_out_prompts
    from texforce_hub.pipelines.load import load_pipeline
    from texforce_hub.rewards.reward import resolve_rewards

    sys.path.insert(0, "")  # python:module:function finds modules of the current folder
    texts = held_out_prompts(prompts)
    variants = _make_variants(adapter or [])
    rewards = resolve_rewards(reward or ["alignment"], choose_device(device))
    pipe = load_pipeline(base, device=device, dtype=dtype)
    if unet is not None:
        variants |= _with_unet(variants, load_pipeline(base, unet=unet, device=device, dtype=dtype).unet)
    sampling = Sampling(
        tuple(range(seed, seed + seeds)), inference_steps or 15, 5.0 if guidance is None else guidance,
        negative_prompt or "", batch_size,
    )  # fmt: skip
    with bars({name: len(texts) * seeds for name in variants}) as advance:
        result = evaluate_variants(pipe, variants, texts, rewards, sampling=sampling, on_images=advance)
    if as_json:
        put_json(describe(result))
    else:
        _print(result)


def print_rewards(*, as_json: bool) -> None:
    """The built-in rewards."""
    if as_json:
        put_json({name: asdict(reward) for name, reward in BUILT_IN.items()})
        return
    rows = [[name, reward.summary, reward.needs] for name, reward in BUILT_IN.items()]
    put_table(["reward", "what it measures", "needs"], rows)


def _make_variants(stacks: list[str]) -> dict[str, "Variant"]:
    """The base, and every stack, read before anything is drawn."""
    from texforce_hub.evaluate.variants import Variant
    from texforce_hub.hub.read import read_adapter
    from texforce_hub.hub.refs.stack import Stack
    from texforce_hub.hub.stack import read_stack

    variants = {"base": Variant()}
    for text in stacks:
        entries = read_stack(list(Stack.parse(text).refs), read=read_adapter)
        variants[text] = Variant(stack=[entry.item for entry in entries])
    return variants


def _with_unet(variants: dict[str, "Variant"], unet: Any) -> dict[str, "Variant"]:
    from texforce_hub.evaluate.variants import Variant

    return {f"unet + {name}" if v.stack else "unet": Variant(v.stack, unet) for name, v in variants.items()}


def _print(result: "Evaluation") -> None:
    first = result.variants[0]
    for reward in result.rewards:
        rows, corrected = [], result.corrected(reward=reward)
        for name in result.variants:
            mean = result.mean(name, reward=reward)
            row = [name, f"{mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]"]
            if name == first:
                rows.append([*row, "", "", ""])
            else:
                against = result.compare(name, first, reward=reward)
                rows.append([*row, str(against.difference), f"{against.wins.mean:.0%}", f"{corrected[name]:.4f}"])
        put_table(["variant", f"{reward}, mean", f"minus {first}, paired", "wins", "p (Holm)"], rows)
    s = result.sampling
    put_detail(
        f"{len(result.prompts)} prompts × {len(s.seeds)} seeds, {s.inference_steps} steps, guidance {s.guidance:g}; "
        "95 % bootstrap intervals over prompts; p by flipping signs, corrected for several variants"
    )
