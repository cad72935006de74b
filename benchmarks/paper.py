"""TexForce's claims (arXiv 2311.15657) in miniature, from nothing: train, combine, blend, tune, schedule.

``python -m benchmarks.paper`` prints the Markdown section of BENCHMARKS.md, draws ``benchmarks/paper.png`` and writes
``paper.json`` beside the runs. Three training seeds, fixed here, for each of two tasks: words for colours and words for
shapes that the base misunderstands. Runs stay under ``--output`` and go on if stopped; with ``--quick`` everything is
tiny and proves nothing but that the script works.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.timing import commit, head, row
from texforce_hub.demo import PROMPT_SEED, PROMPTS, SEEDS, TUNED_UNET
from texforce_hub.evaluate.drawing import Variant
from texforce_hub.evaluate.evaluation import Evaluation, Sampling
from texforce_hub.evaluate.statistics import Interval, bootstrap_mean
from texforce_hub.evaluate.tune import split_in_half, tune_weights
from texforce_hub.evaluate.variants import evaluate_variants
from texforce_hub.generate.images.figure import new_figure, render
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.rewards.reward import Reward, resolve_rewards
from texforce_hub.shapes import GUIDANCE, INFERENCE_STEPS
from texforce_hub.shapes.grammar import sample_prompts
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.run import train_adapter

TASKS = {"colour": {"colour"}, "shape": {"shape"}}
TRAINING_SEEDS = (0, 1, 2)
BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
CONSTANTS = (0.6, 0.8, 1.0, 1.2, 1.4)
SCHEDULES = ("[0-0.25]", "[0-0.5]", "[0-0.75]", "[0.25-1]", "1@0,0@1", "0@0,1@0.5", "1.4@0,0.6@1", "0.6@0,1.4@1")
REHEARSAL: dict[str, Any] = {
    "steps": 1, "prompts_per_step": 2, "images_per_prompt": 2, "inference_steps": 2, "batch_size": 4, "anchor_count": 2,
    "validate_every": 0, "validation_steps": 1, "keep": "last", "sheet_every": 0,
}  # fmt: skip
PLOT = Path(__file__).with_name("paper.png")


@dataclass
class Lab:
    """What every claim is measured with, and the figures so far."""

    pipe: Any
    tuned: Any
    adapters: dict[tuple[str, int], Path]
    quick: bool
    rewards: tuple[Reward, ...] = field(default_factory=lambda: tuple(resolve_rewards(["alignment"])))
    figures: dict[str, Any] = field(default_factory=dict)

    def prompts(self, noisy: set[str], count: int = PROMPTS) -> list[str]:
        """Test prompts: none of their scenes is ever trained on."""
        return sample_prompts(4 if self.quick else count, PROMPT_SEED, split="test", noisy=noisy)

    def measure(
        self, variants: Mapping[str, Variant], prompts: Sequence[str], seeds: Sequence[int] = SEEDS
    ) -> Evaluation:
        """Every variant on the same prompts and noise."""
        sampling = Sampling(tuple(seeds), 2 if self.quick else INFERENCE_STEPS, GUIDANCE)
        return evaluate_variants(self.pipe, variants, prompts, list(self.rewards), sampling=sampling)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, measure the five claims and print them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("paper"), help="folder of the runs and paper.json")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: one seed, two steps, four prompts")
    given = parser.parse_args(arguments)
    seeds = TRAINING_SEEDS[:1] if given.quick else TRAINING_SEEDS
    lab = Lab(
        load_pipeline("shapes", device="cpu"),
        load_pipeline("shapes", unet=TUNED_UNET, device="cpu").unet,
        {(task, seed): train(given.output, task, seed, quick=given.quick) for task in TASKS for seed in seeds},
        given.quick,
    )
    print("## The paper's claims\n")
    print(f"`make paper` at commit {commit()}: `shapes`, training seeds {', '.join(map(str, seeds))} for each task,")
    print(
        f"{len(lab.prompts(set()))} test prompts, two pictures each but where said. Differences of the reward with 95 %"
    )
    print("intervals over prompts; seeds and prompts were fixed before the first run.\n")
    for claim in (combine, blend, tune, schedule):
        claim(lab, seeds)
        print(flush=True)
    with (given.output / "paper.json").open("w") as file:
        json.dump(lab.figures, file, indent=2)
    plot = given.output / PLOT.name if given.quick else PLOT
    render(draw(lab.figures)).save(plot)
    print("![the four figures](benchmarks/paper.png)")


def train(folder: Path, task: str, seed: int, *, quick: bool) -> Path:
    """The adapter of a run with the default settings; a run that is finished is not repeated."""
    output = folder / f"{task}-{seed}"
    file = output / "pytorch_lora_weights.safetensors"
    if not file.exists():
        short = REHEARSAL if quick else {}
        train_adapter(TrainConfig(str(output), prompts=f"shapes:{task}", seed=seed, device="cpu", **short))
    return file


def combine(lab: Lab, seeds: Sequence[int]) -> None:
    """Claims 1 and 2: text training alone, and with a U-Net that others tuned, without training again."""
    noisy, known = lab.prompts({"colour"}), lab.prompts(set())
    variants = {"base": Variant(), "U-Net": Variant(unet=lab.tuned)}
    for seed in seeds:
        text = str(lab.adapters["colour", seed])
        variants |= {f"text {seed}": Variant(text), f"both {seed}": Variant(text, lab.tuned)}
    result = lab.measure(variants, noisy)
    kept = lab.measure({name: v for name, v in variants.items() if v.unet is None}, known)
    print(
        f"**Text training raises the reward, and adds to a tuned U-Net.** Base {result.mean('base').mean:.3f} on noisy"
    )
    print(f"colour words, the tuned U-Net alone {result.difference('U-Net', 'base')}.\n")
    head("seed", "text", "text − base", "both", "both − text", "both − U-Net", "known words, text − base")
    for seed in seeds:
        text, both = f"text {seed}", f"both {seed}"
        row(
            seed, f"{result.mean(text).mean:.3f}", result.difference(text, "base"), f"{result.mean(both).mean:.3f}",
            result.difference(both, text), result.difference(both, "U-Net"), kept.difference(text, "base"),
        )  # fmt: skip
    lab.figures["combine"] = {name: asdict(result.mean(name)) for name in result.variants}
    lab.figures["known"] = {name: asdict(kept.difference(name, "base")) for name in kept.variants}


def blend(lab: Lab, seeds: Sequence[int]) -> None:
    """Claim 3: adapters for two tasks blended by weight trade their rewards."""
    print("**Two tasks blend by weight.** `(1 − w)` of the colour adapter and `w` of the shape adapter; one picture a")
    print("prompt.\n")
    head("seed", "words", *(f"w = {w:g}" for w in BLENDS), "step by step")
    lab.figures["blend"] = {}
    for seed in seeds:
        colour, shape = (str(lab.adapters[task, seed]) for task in TASKS)
        variants = {f"{w:g}": Variant([(colour, 1 - w), (shape, w)]) for w in BLENDS}
        for task, noisy in TASKS.items():
            result = lab.measure(variants, lab.prompts(noisy), SEEDS[:1])
            means = [result.mean(f"{w:g}").mean for w in BLENDS]
            sign = 1 if task == "shape" else -1
            even = all(sign * (b - a) > 0 for a, b in pairwise(means))
            row(seed, task, *(f"{mean:.3f}" for mean in means), "monotone" if even else "not monotone")
            lab.figures["blend"][f"{task} {seed}"] = means


def tune(lab: Lab, seeds: Sequence[int]) -> None:
    """Claim 4: weights chosen by a reward on some prompts beat equal weights on others."""
    print("**Tuned weights against equal ones.** Colour and shape adapters, prompts with noisy words of both kinds;")
    print("searched on half of the prompts from 0.5 each, reported on the other half, one picture a prompt.\n")
    head("seed", "weights found", "equal (0.5 each)", "tuned", "tuned − equal", "1 each", "tuned − 1 each")
    lab.figures["tune"] = {}
    sampling = Sampling(SEEDS[:1], 2 if lab.quick else INFERENCE_STEPS, GUIDANCE)
    prompts = lab.prompts({"colour", "shape"})
    for seed in seeds:
        paths = [str(lab.adapters[task, seed]) for task in TASKS]
        found = tune_weights(
            lab.pipe, [(path, 0.5) for path in paths], prompts, list(lab.rewards), sampling=sampling, seed=seed,
            generations=1 if lab.quick else 8, population=4 if lab.quick else 8, patience=8,
        )  # fmt: skip
        weights = [ref.weight for ref in found.refs]
        variants = {
            "equal": Variant([(path, 0.5) for path in paths]),
            "ones": Variant([(path, 1.0) for path in paths]),
            "tuned": Variant(list(zip(paths, weights))),
        }
        result = lab.measure(variants, found.evaluation.prompts, SEEDS[:1])
        row(
            seed, " / ".join(f"{weight:.2f}" for weight in weights), f"{result.mean('equal').mean:.3f}",
            f"{result.mean('tuned').mean:.3f}", result.difference("tuned", "equal"),
            f"{result.mean('ones').mean:.3f}", result.difference("tuned", "ones"),
        )  # fmt: skip
        lab.figures["tune"][str(seed)] = {
            "weights": weights,
            "equal": asdict(result.difference("tuned", "equal")),
            "ones": asdict(result.difference("tuned", "ones")),
        }


def schedule(lab: Lab, seeds: Sequence[int]) -> None:
    """Claim 5, which is not the paper's: whether a weight that changes over the steps beats a constant one."""
    prompts = lab.prompts({"colour"})
    chosen_on, reported_on = split_in_half(prompts)
    print("**Schedules against constants.** The colour adapter; the best constant of", ", ".join(map(str, CONSTANTS)))
    print(f"and the best schedule of {', '.join(f'`{s}`' for s in SCHEDULES)}")
    print("are chosen on half of the prompts and compared on the other half.\n")
    head("seed", "best constant", "best schedule", "schedule − constant")
    lab.figures["schedule"], differences = {}, []
    for seed in seeds:
        path = str(lab.adapters["colour", seed])
        constants = {f"{w:g}": Variant(f"{path}:{w:g}") for w in CONSTANTS}
        schedules = {s: Variant(path + (s if s.startswith("[") else f":{s}")) for s in SCHEDULES}
        search = lab.measure(constants | schedules, chosen_on)
        constant, ramp = (best(search, names) for names in (constants, schedules))
        result = lab.measure({name: (constants | schedules)[name] for name in (constant, ramp)}, reported_on)
        differences.append(result.per_prompt(ramp) - result.per_prompt(constant))
        row(seed, constant, f"`{ramp}`", result.difference(ramp, constant))
        lab.figures["schedule"][str(seed)] = {name: search.mean(name).mean for name in search.variants}
    pooled = bootstrap_mean(np.mean(differences, 0))
    lab.figures["schedule minus constant"] = asdict(pooled)
    print(f"\nOver the seeds: {pooled}. {verdict(pooled)}")


def verdict(difference: Interval) -> str:
    """In words, whether schedules were better."""
    if not difference.excludes_zero:
        return "No schedule that beats a constant weight was found; the ones tried are those above."
    return "Schedules were better." if difference.low > 0 else "The best schedule is worse than the best constant."


def best(result: Evaluation, names: Mapping[str, Variant]) -> str:
    """Of some variants the one with the highest mean."""
    return max(names, key=lambda name: result.mean(name).mean)


def draw(figures: Mapping[str, Any]) -> Figure:
    """Four panels: the two-by-two, blends, gains of tuning, schedules beside constants."""
    figure = new_figure(11, 7.5)
    panels: list[Callable[..., None]] = [_draw_combined, _draw_blends, _draw_tuned, _draw_schedules]
    for panel, axes in zip(panels, figure.subplots(2, 2).flat):
        panel(figures, axes)
        axes.grid(axis="y", alpha=0.25)
    return figure


def _draw_combined(figures: Mapping[str, Any], axes: Any) -> None:
    rows = figures["combine"]
    means = [interval["mean"] for interval in rows.values()]
    errors = [
        [interval["mean"] - interval["low"] for interval in rows.values()],
        [interval["high"] - interval["mean"] for interval in rows.values()],
    ]
    kinds = {"base": "tab:gray", "U-Net": "tab:orange", "text": "tab:blue", "both": "tab:green"}
    axes.bar(list(rows), means, yerr=errors, capsize=3, color=[kinds[name.split(" ")[0]] for name in rows])
    axes.set(title="Text LoRA (by seed), tuned U-Net, both", ylabel="reward on noisy colour words", ylim=(0, 1))
    axes.tick_params(axis="x", labelrotation=30)


def _draw_blends(figures: Mapping[str, Any], axes: Any) -> None:
    for name, means in figures["blend"].items():
        task, seed = name.split()
        style = "o-" if task == "colour" else "s--"
        axes.plot(BLENDS, means, style, color=f"C{seed}", label=f"{task} words, seed {seed}")
    axes.set(title="Two tasks blended", xlabel="w: 1 − w of the colour adapter, w of the shape one", ylabel="reward")
    axes.legend(fontsize=7)


def _draw_tuned(figures: Mapping[str, Any], axes: Any) -> None:
    for offset, (against, label) in enumerate((("equal", "0.5 each"), ("ones", "1 each"))):
        rows = [entry[against] for entry in figures["tune"].values()]
        at = np.arange(len(rows)) + 0.2 * offset
        means = np.array([interval["mean"] for interval in rows])
        errors = np.array([[i["mean"] - i["low"], i["high"] - i["mean"]] for i in rows]).T
        axes.errorbar(at, means, yerr=errors, fmt="o", capsize=3, label=f"tuned minus {label}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        title="Tuned weights on prompts not searched on", xlabel="training seed", ylabel="difference of the reward"
    )
    axes.set_xticks(range(len(figures["tune"])))
    axes.legend(fontsize=7)


def _draw_schedules(figures: Mapping[str, Any], axes: Any) -> None:
    for seed, means in figures["schedule"].items():
        axes.plot(list(means), list(means.values()), "o", label=f"seed {seed}")
    axes.set(title="Constants and schedules, on the prompts of the choice", ylabel="reward on noisy colour words")
    axes.tick_params(axis="x", labelrotation=60, labelsize=7)
    axes.legend(fontsize=7)


if __name__ == "__main__":
    main()
