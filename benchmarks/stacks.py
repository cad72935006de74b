"""A stack for every picture of a batch: SD1.5's U-Net under many stacks in one call, beside the batch under none.

``python -m benchmarks.stacks`` prints tables of BENCHMARKS.md, row by row. The alternative is to draw picture after
picture, each stack fused before and undone after; from how many denoising steps on it is done first, the last column
tells. Random weights of true sizes, one thread, CPU seconds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.apply import UNET, make_adapter, make_unet
from benchmarks.timing import Timed, commit, head, processor, row, take_turns
from texforce_hub import Adapter, apply_adapter, per_sample_adapters

COUNTS = (1, 8, 32)
RANKS = (4, 16, 64)


def make_stacks(count: int, rank: int) -> list[Adapter]:
    """Random adapters on the attention of SD1.5's U-Net."""
    return [make_adapter("sd1", seed, ("unet",), rank=rank, endings=UNET[:4]) for seed in range(count)]


def one_call(unet: Any, count: int, size: int) -> Callable[[], Any]:
    """One call of the U-Net for so many samples of ``size`` × ``size`` pixels."""
    latents = torch.randn(count, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    return partial(unet, latents, 300, torch.zeros(count, 77, 768))


def fuse_and_undo(unet: Any, stack: Adapter) -> None:
    """What a picture drawn by itself costs besides its calls."""
    apply_adapter(unet, stack, mode="fuse").remove()


def by_turns(unet: Any, stacks: list[Adapter], together: Callable[[], Any], repeats: int) -> dict[str, Timed]:
    """The batch's call without stacks and with them, in turn, and what it costs to enter and leave the block."""
    seconds: dict[str, list[float]] = {"plain": [], "own": [], "enter": []}
    for number in range(repeats + 1):
        start = time.process_time()
        together()
        plain = time.process_time()
        with per_sample_adapters(unet, stacks):
            entered = time.process_time()
            together()
            called = time.process_time()
        left = time.process_time()
        if number:
            for name, took in zip(seconds, (plain - start, called - entered, entered - plain + left - called)):
                seconds[name].append(took)
    return {name: Timed(tuple(times)) for name, times in seconds.items()}


def break_even(batch: dict[str, Timed], single: dict[str, Timed], count: int) -> str:
    """From how many steps on pictures drawn one by one are done before the batch is."""
    more = batch["own"].median - count * single["alone"].median
    once = count * single["fuse"].median - batch["enter"].median
    if more <= 0:
        return "never" if once > 0 else "always"
    return f"{max(1, round(once / more + 0.5))} steps"


def measure(unet: Any, count: int, rank: int, *, halves: int, size: int, repeats: int) -> None:
    """One row: the batch under no stack, under a stack each, and what pictures one by one cost."""
    stacks = make_stacks(count, rank)
    batch = by_turns(unet, stacks, one_call(unet, halves * count, size), repeats)
    calls: dict[str, Callable[[], Any]] = {
        "alone": one_call(unet, halves, size),
        "fuse": partial(fuse_and_undo, unet, stacks[0]),
    }
    single = take_turns(calls, max(2, repeats))
    more = statistics.median(own / plain for own, plain in zip(batch["own"].seconds, batch["plain"].seconds))
    shown = (batch["plain"], batch["own"], f"{100 * (more - 1):+.1f} %", batch["enter"])
    row(count, rank, *shown, single["alone"], single["fuse"], break_even(batch, single, count))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="pixels of a side, a multiple of 64")
    parser.add_argument("--halves", type=int, default=1, help="samples for each picture: 2 with guidance")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="how many stacks")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"`python -m benchmarks.stacks` at commit {commit()}; {processor()}, torch {torch.__version__}, one thread.\n"
    )
    samples = f"{given.size}² pixels, {given.halves} sample{'s' * (given.halves > 1)} a picture"
    print(f"One call of SD1.5's U-Net, {samples}; stacks on its attention:\n")
    head(
        *("stacks", "rank", "no stacks, ms", "a stack each, ms", "longer by", "enter and leave, ms"),
        *("one picture alone, ms", "fuse and undo, ms", "one by one is faster from"),
    )
    unet = make_unet(real=True)
    with torch.no_grad():
        for rank in given.ranks:
            for count in given.counts:
                measure(unet, count, rank, halves=given.halves, size=given.size, repeats=given.repeats)


if __name__ == "__main__":
    main()
