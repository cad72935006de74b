"""``texforce-hub tune``: a reward chooses a stack's weights."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli import names, options
from texforce_hub.cli.console import put, put_detail, put_json
from texforce_hub.cli.environments import prepare_rewards
from texforce_hub.cli.options import RESULT, WORK, option
from texforce_hub.cli.progress import bars
from texforce_hub.cli.table import put_table
from texforce_hub.errors import ConfigError

if TYPE_CHECKING:
    from texforce_hub.evaluate.tune import Generation, Tuning

SEARCH, POPULATION = "The search", 8
_ENDED = {
    "generations": "as many as were allowed",
    "resolved": "ended as it had gained and no further gain could be told from chance",
    "unresolved": "ended as no gain could be told from chance",
    "converged": "ended as its steps were too short to see",
}


def register(app: typer.Typer) -> None:
    """Add ``tune``."""
    app.command("tune")(tune)


def tune(
    adapter: Annotated[
        list[str],
        option("--adapter", metavar="REF", help="Repeatable; its weight is where the search begins.", group=WORK,
               autocompletion=names.refs),
    ],
    reward: options.Rewards = None,
    prompts: options.Prompts = "shapes:colour",
    per: Annotated[str, option("--per", metavar="WHAT", help="A weight per adapter, part or block.", group=SEARCH)] = (
        "adapter"
    ),
    generations: Annotated[int, option("--generations", metavar="N", min=1, help="At most: 12.", group=SEARCH)] = 12,
    population: Annotated[int, option("--population", metavar="N", min=4, help="Candidates in each: 8.", group=SEARCH)]
    = POPULATION,
    patience: Annotated[
        int, option("--patience", metavar="N", min=1, help="Generations without a gain that end it: 4.", group=SEARCH)
    ] = 4,
    highest: Annotated[float, option("--highest", metavar="X", help="Largest weight: 1.5.", group=SEARCH)] = 1.5,
    lowest: Annotated[float, option("--lowest", metavar="X", help="Smallest weight: 0.", group=SEARCH)] = 0.0,
    gradient: Annotated[
        bool, option("--gradient", help="Follow the rewards' gradient instead of searching.", group=SEARCH)
    ] = False,
    seeds: options.Seeds = 1,
    seed: options.FirstSeed = 0,
    base: options.Base = "shapes",
    unet: options.Unet = None,
    strict: options.Strict = True,
    inference_steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    batch_size: options.BatchSize = 64,
    device: options.Device = None,
    dtype: options.Dtype = None,
    yes: options.Yes = False,
    save_recipe: Annotated[
        Path | None, option("--save-recipe", metavar="FILE", help="The tuned stack, for apply --recipe.", group=RESULT)
    ] = None,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Search the weights of a stack that a reward likes best; say what they are worth on prompts it did not see.

    One half of the prompts is for the search, the other for the report.
    """
    if gradient and population != POPULATION:
        raise ConfigError(
            "--population is of the search; --gradient takes one step a generation; leave one of them out"
        )
    prepare_rewards(reward or [], yes=yes)
    from texforce_hub.evaluate.tune import split_in_half, tune_weights
    from texforce_hub.generate.prompts.sets import held_out_prompts
    from texforce_hub.hub.refs.adapter import AdapterRef
    from texforce_hub.hub.stack import read_stack
    from texforce_hub.pipelines.load import load_pipeline
    from texforce_hub.rewards.reward import resolve_rewards

    sys.path.insert(0, "")  # python:module:function finds modules of the current folder
    texts = held_out_prompts(prompts)
    split_in_half(texts)
    given = [AdapterRef.parse(text) for text in adapter]
    read_stack(given)  # what cannot be read is refused before the base is loaded
    pipe = load_pipeline(base, unet=unet, device=device, dtype=dtype)
    rewards = resolve_rewards(reward or ["alignment"], pipe.unet.device)
    sampling = options.make_sampling(seed, seeds, inference_steps, guidance, negative_prompt, batch_size, base=base)
    with bars({"search": generations}) as advance:

        def on_generation(_number: int, _generation: "Generation") -> None:
            advance("search", 1)

        tuning = tune_weights(
            pipe, given, texts, rewards, per=per,  # type: ignore[arg-type]
            generations=generations, population=population, patience=patience, bounds=(lowest, highest),
            gradient=gradient, sampling=sampling, strict=strict, seed=seed, on_generation=on_generation,
        )  # fmt: skip
    stack = list(map(str, tuning.refs))
    if save_recipe is not None:
        _record(tuning, stack, save_recipe, base=base, unet=unet or "", strict=strict)
    if as_json:
        put_json(_described(tuning, stack))
    else:
        _print(tuning, stack)


def _record(tuning: "Tuning", stack: list[str], path: Path, *, base: str, unet: str, strict: bool) -> None:
    from texforce_hub.generate.draw import DrawSettings
    from texforce_hub.generate.recipe import DrawRun, record_run
    from texforce_hub.hub.refs.adapter import AdapterRef

    sampling = tuning.evaluation.sampling
    how: dict[str, Any] = {name: getattr(sampling, name) for name in ("negative_prompt", "inference_steps", "guidance")}
    settings = DrawSettings(tuning.evaluation.prompts[:8], **how)
    record_run(DrawRun(base, tuple(map(AdapterRef.parse, stack)), settings, unet=unet, strict=strict), path)


def _described(tuning: "Tuning", stack: list[str]) -> dict[str, object]:
    from texforce_hub.evaluate.evaluation import describe

    generations = [asdict(generation) for generation in tuning.generations]
    return {
        "stack": stack,
        "generations": generations,
        "ended": tuning.ended,
        "searched": tuning.searched,
        "held_out": describe(tuning.evaluation),
    }


def _print(tuning: "Tuning", stack: list[str]) -> None:
    result = tuning.evaluation
    for reward in result.rewards:
        rows = []
        for name in result.variants:
            against = "" if name == "tuned" else str(result.difference("tuned", name, reward=reward))
            rows.append([name, f"{result.mean(name, reward=reward).mean:.3f}", against])
        put_table(["stack", f"{reward}, held out", "tuned minus it, paired"], rows)
    count = len(tuning.generations)
    put_detail(
        f"{count} generation{'' if count == 1 else 's'} on {len(tuning.searched)} prompts, {_ENDED[tuning.ended]}; "
        f"reported on {len(result.prompts)} others, 95 % bootstrap intervals over prompts"
    )
    gain = result.difference("tuned", tuning.start)
    verdict = "better than" if gain.low > 0 else "worse than" if gain.high < 0 else "not told apart from"
    put(f"{' + '.join(stack)}: {verdict} the weights it began with ({gain})")
