"""Training: what the default recipe learns on ``shapes``, from several seeds, and what it costs of what was known.

``python -m benchmarks.train`` prints the Markdown section of BENCHMARKS.md: per seed, the demo's two-by-two on
held-out prompts. About five minutes a seed on one core; the runs stay under ``--output`` and go on if stopped.
"""

import argparse
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from texforce_hub.demo import PROMPTS, SEEDS, Demonstration, run_demo
from texforce_hub.evaluate.statistics import Interval


def render_row(seed: int, done: Demonstration, seconds: float) -> str:
    """One seed's row of the table."""
    noisy, known = done.evaluation, done.canonical
    differences: Sequence[Interval] = (
        noisy.difference("text", "base"),
        noisy.difference("both", "text"),
        noisy.difference("both", "unet"),
        known.difference("text", "base"),
    )
    return f"| {seed} | {' | '.join(map(str, differences))} | {seconds:.0f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure every seed, then print the section."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks-train"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args(arguments)
    rows = []
    for seed in given.seeds:
        start = time.monotonic()
        done = run_demo(given.output / str(seed), train=True, prompts=PROMPTS, seed=seed)
        rows.append(render_row(seed, done, time.monotonic() - start))
    base, tuned = done.evaluation.mean("base").mean, done.evaluation.mean("unet").mean
    print("## Train\n")
    print(f"`python -m benchmarks.train`; {platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"threads: {torch.get_num_threads()}.")
    print(f"The default recipe on `shapes`, {PROMPTS} held-out prompts, {len(SEEDS)} images each; differences of the")
    print(f"reward with 95 % intervals paired by prompt. Base {base:.3f}, tuned U-Net alone {tuned:.3f}.\n")
    print("Not measured on a GPU yet.\n")
    print("| seed | text − base | both − text | both − U-Net | known words, text − base | seconds |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
