"""What a run changes: the LoRA, its optimiser, its running average, the best weights so far."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor, nn

from texforce_hub.files.checkpoint import State
from texforce_hub.train.config import TrainConfig


class Learner:
    """The trained parameters and everything that remembers them; :meth:`snapshot` and :meth:`restore` are inverse."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        self.parameters = dict(parameters)
        self.config = config
        betas, decay = (config.beta1, config.beta2), config.weight_decay
        self.optimizer = torch.optim.AdamW(self.parameters.values(), config.learning_rate, betas, weight_decay=decay)
        self.average, self.best = self._copies(), self._copies()
        self.step = self.best_step = 0
        self.validations: list[tuple[int, float]] = []

    @property
    def kept(self) -> tuple[int, dict[str, Tensor]]:
        """Step and weights of what goes into the finished file, as ``keep`` says."""
        best = self.config.keep == "best" and self.validations
        return (self.best_step, self.best) if best else (self.step, self.average)

    def set_learning_rate(self) -> float:
        """The learning rate of the step to come."""
        rate = self.config.learning_rate * learning_rate_share(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def finish_step(self) -> None:
        """Count a step and let the running average follow; without ``ema`` it is the parameters themselves."""
        self.step += 1
        decay = min(self.config.ema, self.step / (self.step + 10))  # at first a plain mean, more or less
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - decay)

    def note_validation(self, score: float) -> None:
        """Remember a validation, and the weights if none was better; the earliest of equals stays."""
        if not self.validations or score > max(s for _, s in self.validations):
            self.best_step = self.step
            self.best = {name: tensor.clone() for name, tensor in self.average.items()}
        self.validations.append((self.step, score))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The running average in the place of the parameters, and back."""
        before = self._copies()
        try:
            self._put(self.average)
            yield
        finally:
            self._put(before)

    def snapshot(self) -> State:
        """A copy of everything, on the CPU, with the settings it belongs to."""
        kinds = {"lora": self._copies(), "average": self.average, "best": self.best}
        tensors = {f"{kind}/{name}": tensor for kind, group in kinds.items() for name, tensor in group.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"adam/{name}/{k}": value for k, value in self.optimizer.state.get(parameter, {}).items()}
        facts = {"best_step": self.best_step, "validations": [list(v) for v in self.validations]}
        facts |= {"config": asdict(self.config), "threads": torch.get_num_threads()}
        return State(self.step, {n: t.detach().to("cpu", copy=True) for n, t in tensors.items()}, facts)

    def restore(self, state: State) -> None:
        """Become what :meth:`snapshot` saw."""

        def stored(kind: str) -> dict[str, Tensor]:
            return {n: state.tensors[f"{kind}/{n}"].to(p.device, copy=True) for n, p in self.parameters.items()}

        self._put(stored("lora"))
        self.average, self.best = stored("average"), stored("best")
        self.step, self.best_step = state.step, state.facts["best_step"]
        self.validations = [(step, score) for step, score in state.facts["validations"]]
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (value := state.tensors.get(f"adam/{name}/{key}")) is not None:
                    place = "cpu" if key == "step" else parameter.device  # as AdamW wants it
                    self.optimizer.state[parameter][key] = value.to(place, copy=True)

    def _copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


def learning_rate_share(config: TrainConfig, step: int) -> float:
    """Warm-up times decay at a step, counted from 0, in (0, 1]."""
    warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    done = step / config.steps
    return warmup * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.decay]
