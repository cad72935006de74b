"""What a run changes: the LoRA, its optimiser, its running average, the best weights so far."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from texforce_hub.errors import TrainingError
from texforce_hub.files.checkpoint import State
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.policies.rows import Leaves
from texforce_hub.train.team import ALONE, Team


class Learner:
    """The trained parameters and everything that remembers them; :meth:`snapshot` and :meth:`restore` are inverse."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, team: Team = ALONE) -> None:
        self.parameters = dict(parameters)
        self.config, self.team = config, team
        betas, decay = (config.beta1, config.beta2), config.weight_decay
        self.optimizer = torch.optim.AdamW(self.parameters.values(), config.learning_rate, betas, weight_decay=decay)
        self.first, self.average, self.best = self._copies(), self._copies(), self._copies()
        self.step = self.best_step = 0
        self.taught = False  # whether any step's rewards had a gradient
        self.batch_size = config.batch_size
        self.validations: list[tuple[int, float]] = []
        self.watched: list[tuple[int, float]] = []

    @property
    def succeeded(self) -> bool:
        """Whether there is something to show: a gradient came, and, to keep the best, it beat what was there before."""
        judged = self.config.keep == "best" and 0 in dict(self.validations)
        return self.taught and (self.best_step > 0 or not judged)

    @property
    def kept(self) -> tuple[int, dict[str, Tensor]]:
        """Step and weights of what goes into the finished file, as ``keep`` says."""
        best = self.config.keep == "best" and self.best_step > 0
        return (self.best_step, self.best) if best else (self.step, self.average)

    def learn(self, policy: Policy, texts: Sequence[str], cotangents: Leaves, anchors: Sequence[str]) -> float:
        """One optimiser step: the gradient at the texts' embeddings, and the pull of the anchors to where they were.

        The gradient is brought to norm 1, so that the anchor weighs the same whatever the reward, the resolution and
        the algorithm. Texts and cotangents are this process's, the anchors those of all. Returns the norm before.

        Raises:
            TrainingError: the gradient is not finite; the parameters are as before.
        """
        self.optimizer.zero_grad(set_to_none=True)
        scale = _unit_scale(cotangents)
        with torch.enable_grad():
            torch.autograd.backward(policy.encode(texts), [cotangent * scale for cotangent in cotangents])
        trained = [parameter for parameter in self.parameters.values() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        torch._foreach_div_(gradients, scale)
        pulls = self._pull_back(policy, anchors, trained) if anchors and self.config.anchor else []
        self.team.add([*gradients, *pulls])
        norm = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            raise TrainingError('the gradient is not finite; use dtype = "float32" or "bfloat16"')
        self.taught = self.taught or norm > 0
        torch._foreach_div_(gradients, norm or 1.0)
        if pulls:
            torch._foreach_add_(gradients, pulls)
        self.optimizer.step()
        return norm

    def _pull_back(self, policy: Policy, anchors: Sequence[str], trained: Sequence[nn.Parameter]) -> list[Tensor]:
        """This process's share of the gradient of how far the anchors' embeddings have moved."""
        own = anchors[self.team.share(len(anchors))]
        if not own:
            return [torch.zeros_like(parameter) for parameter in trained]
        with torch.enable_grad():
            pairs = zip(policy.encode(own), policy.reference.encode(own), strict=True)
            shifts = [(now - before.detach()).square().mean() for now, before in pairs]
            loss = self.config.anchor * torch.stack(shifts).sum() * (len(own) / len(anchors))
            return list(torch.autograd.grad(loss, trained))

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
        """Remember a validation, and the weights if it beats every one before, the base's included."""
        if self.step and all(score > other for _, other in self.validations):
            self.best_step = self.step
            self.best = {name: tensor.clone() for name, tensor in self.average.items()}
        self.validations.append((self.step, score))

    def stretch(self, weights: Mapping[str, Tensor], multiple: float) -> dict[str, Tensor]:
        """Weights whose ``up`` has moved ``multiple`` times as far from where it began: from 0, or from ``init``'s."""
        if multiple == 1:
            return dict(weights)
        ups = {name: self.first[name] for name in weights if ".lora_B." in name}
        return {**weights, **{name: first + multiple * (weights[name] - first) for name, first in ups.items()}}

    @contextmanager
    def showing(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Other weights instead of the parameters, and back."""
        before = self._copies()
        try:
            self._put(weights)
            yield
        finally:
            self._put(before)

    def snapshot(self) -> State:
        """A copy of everything, on the CPU, with the settings it belongs to."""
        kinds = {"lora": self._copies(), "average": self.average, "best": self.best}
        tensors = {f"{kind}/{name}": tensor for kind, group in kinds.items() for name, tensor in group.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"adam/{name}/{k}": value for k, value in self.optimizer.state.get(parameter, {}).items()}
        facts: dict[str, Any] = {"best_step": self.best_step, "batch_size": self.batch_size, "taught": self.taught}
        facts |= {name: [list(v) for v in getattr(self, name)] for name in ("validations", "watched")}
        facts |= {"config": asdict(self.config), "threads": torch.get_num_threads(), "processes": self.team.size}
        return State(self.step, {n: t.detach().to("cpu", copy=True) for n, t in tensors.items()}, facts)

    def list_absent(self, state: State) -> list[str]:
        """What :meth:`restore` needs and a state of an earlier version does not have."""
        tensors = [f"{kind}/{name}" for kind in ("lora", "average", "best") for name in self.parameters]
        facts = ("best_step", "batch_size", "taught", "validations", "watched", "threads", "processes")
        return [*(n for n in facts if n not in state.facts), *(n for n in tensors if n not in state.tensors)]

    def restore(self, state: State) -> None:
        """Become what :meth:`snapshot` saw."""

        def stored(kind: str) -> dict[str, Tensor]:
            return {n: state.tensors[f"{kind}/{n}"].to(p.device, copy=True) for n, p in self.parameters.items()}

        self._put(stored("lora"))
        self.average, self.best = stored("average"), stored("best")
        self.step, self.best_step = state.step, state.facts["best_step"]
        self.batch_size = state.facts["batch_size"]
        self.taught = state.facts["taught"]
        self.validations, self.watched = (
            [(step, score) for step, score in state.facts[name]] for name in ("validations", "watched")
        )
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (value := state.tensors.get(f"adam/{name}/{key}")) is not None:
                    device = "cpu" if key == "step" else parameter.device  # as AdamW wants it
                    self.optimizer.state[parameter][key] = value.to(device, copy=True)

    def _copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


def _unit_scale(tensors: Sequence[Tensor]) -> float:
    """The power of two that brings the largest number near 1: an encoder in half precision has nothing below 6e-8."""
    largest = float(torch.stack([tensor.abs().max().float() for tensor in tensors]).max())  # one wait for all
    return 2.0 ** -max(-100, min(100, math.frexp(largest)[1]))


def learning_rate_share(config: TrainConfig, step: int) -> float:
    """Warm-up times decay at a step, counted from 0, in (0, 1]; how many steps the run has does not matter."""
    warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    done = min(1.0, step / config.decay_steps)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.decay]
    return warmup * max(share, config.decay_floor)
