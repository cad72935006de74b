"""``texforce-hub evaluate``: which adapter is better, with intervals."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli.console import put_json, put_table, say

if TYPE_CHECKING:
    from texforce_hub.evaluate.evaluation import Evaluation
    from texforce_hub.evaluate.variants import Variant


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(evaluate)


def evaluate(
    adapter: Annotated[
        list[str] | None, typer.Option(help="A stack to compare with the base, such as 'A:0.8 + B'; repeatable.")
    ] = None,
    base: Annotated[str, typer.Option(help="shapes, a folder, a single file, or a Hub id.")] = "shapes",
    unet: Annotated[str | None, typer.Option(help="A fine-tuned U-Net: adds it alone, and with every stack.")] = None,
    reward: Annotated[list[str] | None, typer.Option(help="NAME or python:module:function, repeatable.")] = None,
    prompts: Annotated[
        str, typer.Option(help="File, one prompt a line; or held-out shapes:colour, shapes:shape, shapes:canonical.")
    ] = "shapes:colour",
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of every prompt.")] = 2,
    seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    inference_steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 15,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 5.0,
    negative_prompt: Annotated[str, typer.Option(help="What guidance steers away from.")] = "",
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch", min=1, help="Pictures in one call; lower it if memory runs out.")
    ] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; by default a GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Score stacks on the same prompts and noise as the base; differences with 95 % intervals paired by prompt."""
    from rich.console import Console
    from rich.progress import Progress

    from texforce_hub.evaluate.evaluation import Sampling
    from texforce_hub.evaluate.variants import evaluate_variants
    from texforce_hub.generate.prompts.sets import held_out_prompts
    from texforce_hub.pipelines.load import load_pipeline
    from texforce_hub.rewards.reward import resolve_rewards

    sys.path.insert(0, "")  # python:module:function finds modules of the current folder
    texts = held_out_prompts(prompts)
    pipe = load_pipeline(base, device=device)
    variants = _make_variants(adapter or [], load_pipeline(base, unet=unet, device=device).unet if unet else None)
    rewards = resolve_rewards(reward or ["alignment"], pipe.unet.device)
    sampling = Sampling(tuple(range(seed, seed + seeds)), inference_steps, guidance, negative_prompt, batch_size)
    with Progress(console=Console(stderr=True)) as bar:
        tasks = {name: bar.add_task(name, total=len(texts) * seeds) for name in variants}
        result = evaluate_variants(
            pipe,
            variants,
            texts,
            rewards,
            sampling=sampling,
            on_images=lambda name, count: bar.advance(tasks[name], count),
        )
    from texforce_hub.evaluate.evaluation import describe

    if as_json:
        put_json(describe(result))
    else:
        _print(result)


def _make_variants(stacks: list[str], unet: Any) -> dict[str, "Variant"]:
    from texforce_hub.evaluate.variants import Variant
    from texforce_hub.hub.refs.stack import Stack

    variants = {"base": Variant()}
    variants |= {text: Variant(stack=list(Stack.parse(text).refs)) for text in stacks}
    if unet is not None:
        variants |= {f"unet + {name}" if v.stack else "unet": Variant(v.stack, unet) for name, v in variants.items()}
    return variants


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
    say(
        f"{len(result.prompts)} prompts × {len(s.seeds)} seeds, {s.inference_steps} steps, guidance {s.guidance:g}; "
        "95 % bootstrap intervals over prompts; p by flipping signs, corrected for several variants"
    )
