"""``texforce-hub evaluate``: which adapter is better, with intervals."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli import names, options
from texforce_hub.cli.console import put, put_detail, put_json
from texforce_hub.cli.environments import prepare_rewards
from texforce_hub.cli.options import MEASURED, RESULT, WORK, option
from texforce_hub.cli.progress import bars
from texforce_hub.cli.table import put_table
from texforce_hub.errors import ConfigError
from texforce_hub.rewards.built_in import BUILT_IN

if TYPE_CHECKING:
    from texforce_hub.evaluate.plan import Request


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(evaluate)


def evaluate(
    adapter: Annotated[
        list[str] | None,
        option("--adapter", metavar="STACK", help="What to compare with the base, 'A:0.8 + B'; repeatable.",
               group=WORK, autocompletion=names.refs),
    ] = None,
    base: options.Base = "shapes",
    unet: options.Unet = None,
    strict: options.Strict = True,
    reward: options.Rewards = None,
    held_out_reward: Annotated[
        list[str] | None,
        option("--held-out-reward", metavar="NAME", help="As --reward; marked: nothing was trained on it.",
               group=MEASURED, autocompletion=names.rewards),
    ] = None,
    list_rewards: Annotated[bool, option("--list-rewards", help="Show the rewards and stop.", group=MEASURED)] = False,
    prompts: options.Prompts = "shapes:colour",
    training_prompts: Annotated[
        str | None,
        option("--training-prompts", metavar="FILE", help="Figures of their own: what was trained on.", group=MEASURED),
    ] = None,
    paraphrases: Annotated[
        str | None,
        option("--paraphrases", metavar="FILE", help="Figures of their own: the same said otherwise.", group=MEASURED),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        option("--sweep", metavar="NAME=…", help="Weights of an adapter, 0:1:5 or A,B,C; two of a stack at most.",
               group=MEASURED),
    ] = None,
    pairs: Annotated[bool, option("--pairs", help="Compare every stack with every other.", group=MEASURED)] = False,
    require: Annotated[
        list[str] | None,
        option("--require", metavar="A>B", help="Exit 1 unless A is better, e.g. 'both>unet'; repeatable.",
               group=MEASURED),
    ] = None,
    seeds: options.Seeds = 2,
    seed: options.FirstSeed = 0,
    inference_steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    batch_size: options.BatchSize = 64,
    lock: options.LockFile = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    yes: options.Yes = False,
    processes: Annotated[
        int, option("--processes", metavar="N", min=1, max=1000, help="With --output: draw by N at once.", group=WORK)
    ] = 1,
    output: Annotated[
        Path | None,
        option("--output", "-o", metavar="DIR", help="Folder for figures, scores, pictures; a run goes on in it.",
               group=RESULT),
    ] = None,
    force: Annotated[bool, option("--force", help="Replace another evaluation in DIR.", group=RESULT)] = False,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Score stacks on the same prompts and noise as the base; differences with 95 % intervals paired by prompt."""
    given = dict(locals())
    if list_rewards:
        print_rewards(as_json=as_json)
        return
    prepare_rewards([*(reward or ()), *(held_out_reward or ())], yes=yes)
    sys.path.insert(0, "")  # python:module:function finds modules of the current folder
    results = _measure(_make_request(given), given)
    if results is None:
        return  # another process of several prints
    if as_json:
        put_json(results)
    else:
        _print(results)
    if not all(requirement["met"] for requirement in results["requirements"]):
        raise typer.Exit(1)


def print_rewards(*, as_json: bool) -> None:
    """The built-in rewards."""
    if as_json:
        put_json({name: asdict(reward) for name, reward in BUILT_IN.items()})
        return
    rows = [[name, reward.summary, reward.needs] for name, reward in BUILT_IN.items()]
    put_table(["reward", "what it measures", "needs"], rows)


def _make_request(given: dict[str, Any]) -> "Request":
    from texforce_hub.evaluate.plan import Request
    from texforce_hub.generate.prompts.sets import held_out_prompts, training_prompts

    groups = {"held-out": held_out_prompts(given["prompts"])}
    if given["training_prompts"] is not None:
        groups["training"] = training_prompts(given["training_prompts"])
    if given["paraphrases"] is not None:
        groups["paraphrase"] = held_out_prompts(given["paraphrases"])
    sampled = ("seed", "seeds", "inference_steps", "guidance", "negative_prompt", "batch_size")
    return Request(
        {group: tuple(texts) for group, texts in groups.items()},
        tuple(given["adapter"] or ()),
        given["base"],
        given["unet"] or "",
        tuple(given["reward"] or ["alignment"]),
        tuple(given["held_out_reward"] or ()),
        options.make_sampling(*(given[name] for name in sampled), base=given["base"]),
        tuple(given["sweep"] or ()),
        given["strict"],
    )


def _measure(request: "Request", given: dict[str, Any]) -> dict[str, Any] | None:
    """The results; ``None`` in a process that draws a share for another."""
    from texforce_hub.device import choose_device
    from texforce_hub.evaluate.folder import EvaluationFolder
    from texforce_hub.evaluate.plan import make_plan
    from texforce_hub.evaluate.processes import Launch, Share, evaluate_in_folder
    from texforce_hub.evaluate.run import EvaluationRun
    from texforce_hub.hub.pickles import are_pickles_permitted

    share, output, processes = Share.from_environment(), given["output"], given["processes"]
    _check_processes(share.count, processes, output, force=given["force"])
    if output is not None:
        EvaluationFolder(output).check()
    plan, device = make_plan(request), share.device(given["device"])
    run = EvaluationRun(plan, device=choose_device(device), pairs=given["pairs"], require=given["require"] or ())
    run.load(device=device, dtype=given["dtype"])
    total = len(plan.texts) * len(request.sampling.seeds)
    with bars(dict.fromkeys(plan.names, total)) as advance:
        if output is None:
            return run.measure(advance)
        pickles = are_pickles_permitted()
        launch = Launch(request, output, given["device"], given["dtype"], given["lock"], pickles)
        how: dict[str, Any] = {"processes": processes, "force": given["force"], "on_images": advance}
        return evaluate_in_folder(launch, run, share, **how)


def _check_processes(started: int, processes: int, output: Path | None, *, force: bool) -> None:
    if started > 1 and processes > 1:
        raise ConfigError("--processes within accelerate launch or torchrun, which started several; leave it out")
    if max(started, processes) > 1 and output is None:
        raise ConfigError("several processes gather what they draw in a folder; give --output DIR")
    if force and output is None:
        raise ConfigError("--force replaces what is in --output; give that too, or leave it out")


def _print(results: dict[str, Any]) -> None:
    from texforce_hub.evaluate.tables import describe_requirements, describe_sampling, tabulate

    for figures in tabulate(results):
        put_table(list(figures.columns), figures.rows, title=figures.title, drop=("could show",))
    put_detail(describe_sampling(results))
    for line in describe_requirements(results):
        put(line)
