"""An evaluation by several processes: each draws a share of the batches, the first one gathers what all have drawn.

Started by ``accelerate launch`` or ``torchrun``, a process finds its rank in the environment, as they leave it there;
``--processes`` starts the others itself. They talk through the folder alone: each appends to its own file of scores and
holds a lock while it works, so that a process that has died is noticed, and its share drawn by the first.
"""

import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from texforce_hub.errors import ConfigError, FileError, TexForceHubError
from texforce_hub.evaluate.folder import PLAN, EvaluationFolder
from texforce_hub.evaluate.plan import Request, make_plan
from texforce_hub.evaluate.run import EvaluationRun
from texforce_hub.evaluate.variants import OnImages
from texforce_hub.hub.lock import use_lock
from texforce_hub.hub.pickles import permitting_pickles

logger = logging.getLogger("texforce_hub")

_PATIENCE = 600.0  # seconds in which the first process should have loaded its pipeline and written the plan


@dataclass(frozen=True, slots=True)
class Share:
    """Which of several processes this one is."""

    rank: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Share":
        """What ``accelerate launch`` and ``torchrun`` say; without them, the only process.

        Raises:
            ConfigError: what they say makes no sense.
        """
        rank, count = (environment.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
            raise ConfigError(f"RANK={rank!r} of WORLD_SIZE={count!r}; expected whole numbers, the first the smaller")
        return cls(int(rank), int(count))

    def device(self, name: str | None) -> str | None:
        """The device of this process: of several GPUs one each, unless one is named."""
        cards = torch.cuda.device_count()
        if self.count > 1 and cards > 1 and name in (None, "cuda"):
            return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % cards}"
        return name


@dataclass(frozen=True)
class Launch:
    """All that another process needs to draw its share."""

    request: Request
    output: Path
    device: str | None = None
    dtype: str | None = None
    lock: Path | None = None
    pickles: bool = False


@contextmanager
def others_at_work(launch: Launch, count: int) -> Iterator[None]:
    """All processes but the first at work during the block; at its end they are gone."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    threads = torch.get_num_threads()  # the same everywhere: sums over other numbers of threads differ in rounding
    given = [(launch, Share(rank, count), threads) for rank in range(1, count)]
    others = [context.Process(target=_work, args=arguments, daemon=True) for arguments in given]
    for process in others:
        process.start()
    try:
        yield
        for process in others:
            process.join()
    finally:
        for process in others:
            process.terminate()
            process.join()


def _work(launch: Launch, share: Share, threads: int) -> None:
    torch.set_num_threads(threads)
    logger.setLevel(logging.ERROR)  # the first process says the rest
    device = share.device(launch.device)
    try:
        with use_lock(launch.lock), permitting_pickles(allow=launch.pickles):
            run = EvaluationRun(make_plan(launch.request), device=device)
            run.load(device=device, dtype=launch.dtype)
            evaluate_in_folder(launch, run, share)
    except TexForceHubError as error:
        logger.error("process %d of %d: %s", share.rank, share.count, error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)  # the first process says so


def _wait_for_plan(folder: EvaluationFolder) -> None:
    last = time.monotonic() + _PATIENCE
    while not (folder.path / PLAN).is_file():
        if time.monotonic() > last:
            raise FileError(f"{folder.path}: the first process has written no {PLAN} for {_PATIENCE:.0f} s")
        time.sleep(0.1)


def evaluate_in_folder(
    launch: Launch,
    run: EvaluationRun,
    share: Share,
    *,
    processes: int = 1,
    force: bool = False,
    on_images: OnImages | None = None,
) -> dict[str, Any] | None:
    """Draw, score and write an evaluation into a folder; what is there of it already is kept.

    Args:
        run: loaded already.
        share: this process; others than the first draw their share and give ``None``.
        processes: how many this one starts, itself among them; not within ``accelerate launch``.
        force: replace another evaluation that is in the folder.

    Returns:
        The results, as ``results.json`` has them.

    Raises:
        FileError: the folder holds something else, another evaluation, or another process at work.
    """
    folder = EvaluationFolder(launch.output, rank=share.rank)
    with folder.locked():
        if share.rank:
            _wait_for_plan(folder)
            run.begin(folder)
            run.draw_share(folder, share.count, on_images)
            folder.retire()
            return None
        run.begin(folder, force=force)
        count = max(processes, share.count)
        pinned = replace(launch, request=run.plan.request)  # a base from the Hub moves while the others load
        with others_at_work(pinned, processes):
            run.draw_share(folder, count, on_images)
        return run.finish(folder, count)
