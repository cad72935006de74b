"""Training: which denoising steps teach, what recipes learn on ``shapes``, and what a picture costs at SD1.5's size.

``python -m benchmarks.train`` prints the Markdown section of BENCHMARKS.md and draws ``benchmarks/train.png``;
``--parts`` chooses among ``signal``, ``recipes`` and ``size``. A recipe takes some three minutes a seed on one quiet
core; its runs stay under ``--output`` and go on if stopped. A *unit* is one picture through the U-Net forwards;
backwards counts 1.08.
"""

import argparse
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks.size import print_size
from benchmarks.timing import head, row
from texforce_hub.adapter.value import Adapter
from texforce_hub.demo import PROMPT_SEED, PROMPTS, SEEDS
from texforce_hub.errors import NotBetterError
from texforce_hub.evaluate.drawing import Variant
from texforce_hub.evaluate.evaluation import Evaluation, Sampling
from texforce_hub.evaluate.variants import evaluate_variants
from texforce_hub.generate.images.figure import new_figure, render
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.rewards.reward import resolve_rewards
from texforce_hub.shapes import GUIDANCE, INFERENCE_STEPS
from texforce_hub.shapes.grammar import sample_prompts
from texforce_hub.train.algorithms.streaming import sample_scored
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.estimate import count_units
from texforce_hub.train.judge import Judge
from texforce_hub.train.policies import choose
from texforce_hub.train.policies import steps as schedule
from texforce_hub.train.policies.frozen import frozen
from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.run import train_adapter

BACKWARD = 1.08
STRETCHES = 2  # validations more, in the end
RECIPES: dict[str, dict[str, Any]] = {
    "streaming": {},
    "ppo": {"algorithm": "ppo", "updates": 2},
    "independent noise": {"antithetic": False},
    "weaker anchor": {"anchor": 5.0},
    "no anchor": {"anchor": 0.0, "canonical": 0.625},
    "higher rate": {"learning_rate": 4.5e-3},
    "direct": {"algorithm": "direct", "learning_rate": 5e-4},
}
PARTS = ["signal", "recipes", "size"]
PLOT = Path(__file__).with_name("train.png")
FRONTIER = Path(__file__).with_name("frontier.png")
COLOURS = dict(
    zip(RECIPES, ("tab:blue", "tab:orange", "tab:brown", "tab:cyan", "tab:green", "tab:purple", "tab:red"), strict=True)
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks-train"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=[*RECIPES], default=[*RECIPES])
    parser.add_argument("--rounds", type=int, default=8, help="of 128 pictures, for the signal")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    given = parser.parse_args(arguments)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print("## Train\n")
    print(f"`python -m benchmarks.train` at commit {commit.stdout.strip()}; {platform.machine()}, torch ", end="")
    print(f"{torch.__version__}, threads: {torch.get_num_threads()}. Not measured on a GPU yet.\n")
    if "signal" in given.parts:
        print_signal(given.rounds)
    if "recipes" in given.parts:
        print_recipes(given.output, given.recipes, given.seeds)
    if "size" in given.parts:
        print_size()


def make_policy(pipeline: Any, config: TrainConfig) -> Policy:
    """A policy on a pipeline, as a run makes it."""
    return choose.make_policy(pipeline, config, seed=1)[0]


def print_signal(rounds: int) -> None:
    """Squared signal-to-noise of a group of 16 pictures, by which steps are trained on."""
    prompts = [
        f"a {word} {shape}" for word in ("crimson", "cobalt", "lime", "golden") for shape in ("circle", "square")
    ]
    config = TrainConfig("unused", prompts_per_step=8, images_per_prompt=16, share=1.0, batch_size=32)
    policy = make_policy(load_pipeline("shapes", device="cpu"), config)
    judge = Judge(resolve_rewards(["alignment"]), config)
    limit, schedule.SENSITIVE = schedule.SENSITIVE, float("inf")  # every step is scored here
    gradients = []
    with frozen(policy.pipeline):
        for number in range(rounds):
            _, scores = sample_scored(policy, prompts, judge, Generator().manual_seed(number))
            advantages = judge.advantages().view(-1, 1, 1)
            steps = torch.stack([leaves[0] for leaves in scores.values()])
            gradients.append((advantages * steps).reshape(len(steps), 8, 16, *steps.shape[2:]).mean(2))
    schedule.SENSITIVE = limit
    stack = torch.stack(gradients)  # rounds, denoising steps, prompts, length, width
    w = schedule.sensitivity(policy.make_steps(config.inference_steps))
    choices = {"all but the last": range(9), "all but the last two": range(8), "the first half": range(5), "first": [0]}
    print(
        f"Signal of the gradient at the base's own policy, {rounds} independent groups of 16 pictures of 8 prompts.\n"
    )
    print("| steps trained on | share of all w² | SNR² of a group of 16 | units a picture | SNR² per 1,000 units |")
    print("|---|---|---|---|---|")
    for name, chosen in choices.items():
        snr2, units = signal_to_noise(stack[:, list(chosen)].sum(1)), 20 + BACKWARD * len(chosen)
        share = (w[list(chosen)].square().sum() / w.square().sum()).item()
        print(f"| {name} | {share:.0%} | {snr2:.2f} | {units:.1f} | {snr2 / (16 * units) * 1000:.2f} |")
    print()


def signal_to_noise(groups: Tensor) -> float:
    """Of independent estimates ``(groups, …)`` of one gradient: the square of their common part over their variance."""
    flat = groups.flatten(1).double()
    noise = flat.var(0).sum()
    return float((flat.mean(0).square().sum() - noise / len(flat)) / noise)


def print_recipes(folder: Path, recipes: Sequence[str], seeds: Sequence[int]) -> None:
    """Train, measure on test prompts, and plot all that has been measured so far with this folder."""
    pipe = load_pipeline("shapes", device="cpu")
    file = folder / "frontier.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    print(
        f"`shapes`, noisy colour words; {PROMPTS} test prompts, {len(SEEDS)} pictures each, differences from the base"
    )
    print("with 95 % intervals paired by prompt; units include validations.\n")
    head("recipe", "seed", "step", "times", "units", "noisy words", "minus base", "known words, minus base")
    for name in recipes:
        runs = {str(seed): train(folder, name, seed) for seed in seeds}
        variants = {"base": Variant()} | {seed: Variant(run.adapter) for seed, run in runs.items() if run.adapter}
        noisy, known = (measure(pipe, variants, words) for words in ({"colour"}, set[str]()))
        for seed, run in runs.items():
            if run.adapter is None:
                row(name, seed, "–", "–", f"{run.units:,.0f}", "no step beat the base", "", "")
                continue
            metadata = run.adapter.metadata
            row(
                name, seed, metadata["texforce_hub.steps"], metadata.get("texforce_hub.multiple", "1"),
                f"{run.units:,.0f}", f"{noisy.mean(seed).mean:.3f}", noisy.difference(seed, "base"),
                known.difference(seed, "base"),
            )  # fmt: skip
        figures["base"] = [[known.mean("base").mean, noisy.mean("base").mean]]
        figures[name] = [[known.mean(seed).mean, noisy.mean(seed).mean] for seed in variants if seed != "base"]
        figures[f"{name}, curves"] = [run.curve for run in runs.values()]
        file.write_text(json.dumps(figures, indent=1))
    plot({name: figures[f"{name}, curves"] for name in RECIPES if name in figures})
    plot_frontier({name: figures[name] for name in RECIPES if name in figures}, figures["base"][0])
    print("\n![held-out reward against units](benchmarks/train.png)")
    print("\n![reward on noisy words against reward on known words](benchmarks/frontier.png)\n")


@dataclass(frozen=True)
class Run:
    """A finished run: its adapter if any step beat the base, what it cost, and its validations against units."""

    adapter: Adapter | None
    units: float
    curve: list[tuple[float, float]]


def train(folder: Path, recipe: str, seed: int) -> Run:
    """One recipe with one seed; what is finished is not trained again."""
    output = folder / f"{recipe.replace(' ', '-')}-{seed}"
    config = TrainConfig(str(output), prompts="shapes:colour", seed=seed, device="cpu", **RECIPES[recipe])
    try:
        adapter = train_adapter(config)
    except NotBetterError:
        adapter = None
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    curve = [(spent(config, m["step"]), m["validation"]) for m in metrics if m["validation"] is not None]
    stretched = STRETCHES * validation_units(config) if adapter else 0
    return Run(adapter, spent(config, config.steps) + stretched, curve)


def measure(pipe: Any, variants: dict[str, Variant], noisy: set[str]) -> Evaluation:
    """As the demo measures: test prompts, equal noise, the pipeline's ordinary call."""
    prompts = sample_prompts(PROMPTS, PROMPT_SEED, split="test", noisy=noisy)
    sampling = Sampling(SEEDS, INFERENCE_STEPS, GUIDANCE)
    return evaluate_variants(pipe, variants, prompts, resolve_rewards(["alignment"]), sampling=sampling)


def spent(config: TrainConfig, step: int) -> float:
    """Units after so many steps, with their validations."""
    forwards, backwards = count_units(config, len(range(0, config.inference_steps, 2)))
    validations = 1 + step // config.validate_every
    return step * (forwards + BACKWARD * backwards) + validations * validation_units(config)


def validation_units(config: TrainConfig) -> int:
    """Units of a validation."""
    return 2 * config.validation_prompts * config.validation_images * config.picture_steps


def plot(curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> None:
    """The held-out reward against units: a colour a recipe, a line a seed."""
    figure = new_figure(8.5, 4.5)
    axes = figure.add_subplot()
    for name, runs in curves.items():
        for number, points in enumerate(runs):
            label = name if not number else None
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], markersize=3, label=label)
    axes.set(xlabel="units: pictures through the U-Net", ylabel="held-out reward, half in known words")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8)
    render(figure).save(PLOT)


def plot_frontier(frontier: Mapping[str, Sequence[tuple[float, float]]], base: tuple[float, float]) -> None:
    """What was learned against what was kept: a point a run, the base's own beside them."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    for name, points in frontier.items():
        known, noisy = [point[0] for point in points], [point[1] for point in points]
        axes.plot(known, noisy, "o", color=COLOURS[name], label=name)
    axes.plot(*base, "x", color="black", label="base")
    axes.axvline(base[0] - 0.01, color="gray", linewidth=0.8, linestyle=":")
    axes.axhline(0.70, color="gray", linewidth=0.8, linestyle=":")
    axes.set(
        title="What was learned against what was kept (dotted: the aims)",
        xlabel="reward on test prompts in known words", ylabel="reward on test prompts in noisy words",
    )  # fmt: skip
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8)
    render(figure).save(FRONTIER)


if __name__ == "__main__":
    main()
