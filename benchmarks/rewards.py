"""Rewards in other processes beside the same reward in this one: equal pictures, equal scores, seconds of the wall.

``python -m benchmarks.rewards`` prints the Markdown section of BENCHMARKS.md. Detectors are measured where their
environment is there: ``texforce-hub rewards check env:hands --yes`` makes it.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import Timed, commit, head, processor, ratio, row, take_turns
from texforce_hub.rewards.environment.build import is_built
from texforce_hub.rewards.environment.spec import EnvironmentRef
from texforce_hub.rewards.reward import resolve_reward

PICTURES, SIDE = 32, 512


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print("## Rewards\n")
    print(f"`python -m benchmarks.rewards` at commit {commit()}; {processor()}, torch {torch.__version__}.")
    print(f"Milliseconds of the wall for {PICTURES} pictures of {SIDE} × {SIDE}, medians with the quarters around")
    print(
        f"them; {os.cpu_count()} cores, shared with other work. A question is 96 MiB through the loopback; two workers"
    )
    print("divide it. Every row of a reward has the same scores.\n")
    head("reward", "where", "ms", "pictures a second", "to the first row")
    images, prompts = make_pictures(), ["a picture"] * PICTURES
    with ExitStack() as stack:
        addresses = [stack.enter_context(serving("jpeg")) for _ in range(2)]
        places = {
            "this process": "jpeg",
            "1 server": f"{addresses[0]}/jpeg",
            "2 servers": ",".join(f"{address}/jpeg" for address in addresses),
        }
        measure("`jpeg`", places, images, prompts, repeats)
    if is_built(EnvironmentRef.parse("env:hands").requirements()):
        for name in ("env:hands", "env:faces"):
            measure(f"`{name}`", {"1 process": name, "2 processes": f"{name}:2"}, images, prompts, repeats)


def make_pictures() -> Tensor:
    """Drawn hands, each a little brighter than the one before, ``(PICTURES, 3, SIDE, SIDE)``."""
    import numpy as np

    from benchmarks.drawn_hand import draw_hand

    hand = torch.from_numpy(np.asarray(draw_hand(SIDE)).copy()).permute(2, 0, 1) / 255
    return torch.stack([hand * (0.8 + 0.2 * i / PICTURES) for i in range(PICTURES)])


@contextmanager
def serving(name: str) -> Iterator[str]:
    """The address of a reward server that runs meanwhile."""
    command = [sys.executable, "-m", "texforce_hub", "reward-server", "--reward", name, "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip().rpartition("/")[0]
        finally:
            process.terminate()


def measure(name: str, places: Mapping[str, str], images: Tensor, prompts: list[str], repeats: int) -> None:
    """A row for each place, after their scores were found to be the same."""
    rewards = {place: resolve_reward(spec) for place, spec in places.items()}
    scores = [reward(images, prompts) for reward in rewards.values()]
    assert all(torch.equal(given, scores[0]) for given in scores), "they differ"
    calls = {place: partial(reward, images, prompts) for place, reward in rewards.items()}
    times = take_turns(calls, repeats, clock=time.perf_counter)
    first: Timed = next(iter(times.values()))
    for place, timed in times.items():
        row(name, place, timed, f"{PICTURES / timed.median:.0f}", f"{ratio(first, timed):.2f} ×")


if __name__ == "__main__":
    main()
