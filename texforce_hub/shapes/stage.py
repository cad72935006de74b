"""One optimisation of the build: a loss, a fixed number of steps, and all that a restart needs."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Generator, Tensor, nn

from texforce_hub.files.checkpoint import State, read_checkpoint, write_checkpoint

SAVE_EVERY = 200


@dataclass(frozen=True)
class Stage:
    """One optimisation: its parameters, its loss of one step, and how long and how fast."""

    name: str
    modules: nn.Module
    loss: Callable[[Generator], Tensor]
    steps: int
    rate: float
    betas: tuple[float, float] = (0.9, 0.99)
    decay: float = 1e-4
    average: float = 0.0  # of the exponential moving average of the weights; 0 keeps none


@dataclass
class Progression:
    """Where a stage is: step, optimiser, average – all that a restart needs."""

    folder: Path
    step: int = 0
    seconds: float = 0.0
    average: list[Tensor] = field(default_factory=list)

    def save(self, stage: Stage, optimiser: torch.optim.Optimizer) -> None:
        """Write the state as a checkpoint, then remove the one before."""
        tensors = {f"average/{i}": tensor for i, tensor in enumerate(self.average)}
        tensors |= {f"modules/{name}": tensor for name, tensor in stage.modules.state_dict().items()}
        for i, moments in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{i}/{name}": tensor for name, tensor in moments.items()}
        write_checkpoint(self.folder, State(self.step, tensors, {"seconds": self.seconds}), keep=1)

    def load(self, stage: Stage, optimiser: torch.optim.Optimizer) -> None:
        """Take up a state written by :meth:`save`, if there is one."""
        state = read_checkpoint(self.folder)
        if state is None:
            return
        kinds: dict[str, dict[str, Tensor]] = {"average": {}, "modules": {}, "optimiser": {}}
        for key, tensor in state.tensors.items():
            kind, _, name = key.partition("/")
            kinds[kind][name] = tensor
        stage.modules.load_state_dict(kinds["modules"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in kinds["optimiser"].items():
            number, _, name = key.partition("/")
            moments.setdefault(int(number), {})[name] = tensor
        optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
        self.average = [kinds["average"][str(i)] for i in range(len(self.average))]
        self.step, self.seconds = state.step, state.facts["seconds"]


def optimise(stage: Stage, seed: int, folder: Path, bar: Progress, until: int | None = None) -> float:
    """Run a stage to its end (or to step ``until``) with AdamW, warm-up and cosine decay; returns its seconds."""
    parameters = list(stage.modules.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=stage.rate, betas=stage.betas, weight_decay=stage.decay)
    at = Progression(folder / stage.name, average=[p.detach().clone() for p in parameters])
    at.load(stage, optimiser)
    task = bar.add_task(stage.name, total=stage.steps, completed=at.step, loss="")
    running, since = 0.0, time.monotonic()
    until = stage.steps if until is None else until
    while at.step < until:
        for group in optimiser.param_groups:
            group["lr"] = _rate(stage, at.step)
        loss = stage.loss(Generator().manual_seed(_step_seed(seed, stage.name, at.step)))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        at.step += 1
        if stage.average:
            keep = min(stage.average, at.step / (at.step + 20))
            torch._foreach_lerp_(at.average, [p.detach() for p in parameters], 1 - keep)
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        if at.step % SAVE_EVERY == 0 or at.step == until:
            at.seconds, since = at.seconds + time.monotonic() - since, time.monotonic()
            at.save(stage, optimiser)
        bar.update(task, completed=at.step, loss=f"{running:.4f}")
    if stage.average:
        with torch.no_grad():
            for parameter, mean in zip(parameters, at.average, strict=True):
                parameter.copy_(mean)
    return at.seconds


def _rate(stage: Stage, step: int) -> float:
    return stage.rate * min(1.0, (step + 1) / 60) * (0.49 * (1 + math.cos(math.pi * step / stage.steps)) + 0.02)


def _step_seed(seed: int, stage: str, step: int) -> int:
    return (seed * 10 + ["text", "vae", "unet", "turbo"].index(stage)) * 1_000_003 + step
