"""Rewards: functions ``f(images (b, 3, h, w) in [0, 1], prompts) -> (b,)``; more is better.

A built-in is a module of this folder with a factory, ``alignment(device) -> f``, that does its heavy imports inside;
somebody else's is ``python:module:function`` or ``python:./file.py:function``, the scoring function itself. Whatever
a reward returns is checked before it is used.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from texforce_hub.errors import RewardError
from texforce_hub.rewards.built_in import BUILT_IN
from texforce_hub.rewards.functions import Score, call_function, import_function
from texforce_hub.rewards.ref import RewardRef
from texforce_hub.settings import suggest_name


@dataclass(frozen=True)
class Reward:
    """A scoring function with its name, its weight among several, and the contract checked at every call.

    Raises:
        RewardError: on a call, if the function raises or gives another shape, or a value that is not finite;
            the message names the prompt.
    """

    name: str
    function: Score
    weight: float = 1.0
    differentiable: bool = False
    remote: bool = False  # the work is done elsewhere: there is other work to do here meanwhile

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores ``(b,)``, float32, on the images' device; images ``(b, 3, h, w)`` in [0, 1]."""
        scores = call_function(self.name, self.function, images, prompts)
        if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
            seen = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise RewardError(
                f"reward {self.name!r} gave {seen} for {len(prompts)} pictures, "
                f"the first of {prompts[0]!r}; expected a tensor of shape ({len(prompts)},)"
            )
        bad = (~scores.detach().isfinite()).nonzero()
        if len(bad):
            first = int(bad[0])
            raise RewardError(f"reward {self.name!r} gave {scores[first].item()} for the prompt {prompts[first]!r}")
        checked: Tensor = scores.float().to(images.device)
        return checked

    def move(self, device: torch.device | str) -> None:
        """Move the networks that the function holds, in its attributes or in what it encloses."""
        for network in _networks(self.function):
            network.to(device)


def _networks(holder: Any, deep: int = 3) -> Iterator[nn.Module]:
    """The networks in an object's attributes, in what a function encloses, and in those' own."""
    if isinstance(holder, nn.Module):
        yield holder
    elif deep:
        parts = [*getattr(holder, "__dict__", {}).values(), getattr(holder, "__self__", None)]
        for cell in getattr(holder, "__closure__", None) or ():
            with suppress(ValueError):  # a name that has no value yet
                parts.append(cell.cell_contents)
        for part in parts:
            yield from _networks(part, deep - 1)


def resolve_reward(spec: str, device: str | torch.device = "cpu") -> Reward:
    """The reward that ``NAME[=WEIGHT]`` names.

    A built-in, a learned one with ``NAME:FOLDER`` of its files, ``python:module:function`` or
    ``python:./file.py:function``, or a reward server's address.

    Raises:
        RefError: the weight is no number.
        RewardError: there is no such reward, or its function cannot be imported.
    """
    ref = RewardRef.parse(spec)
    name, weight = ref.name, ref.weight
    if weight == 0:
        raise RewardError(f"reward {spec!r} has weight 0; leave it out")
    if name.startswith("python:"):
        function = import_function(name)
        return Reward(name, function, weight, differentiable=bool(getattr(function, "differentiable", False)))
    if name.startswith(("http://", "https://")):
        from texforce_hub.rewards.remote import remote_reward

        return Reward(name, remote_reward(name), weight, remote=True)
    if name.startswith("env:"):
        from texforce_hub.rewards.environment.resolve import environment_reward
        from texforce_hub.rewards.environment.spec import EnvironmentRef

        environment = EnvironmentRef.parse(name)
        return Reward(environment.name, environment_reward(environment), weight, remote=True)
    return _resolve_built_in(name, weight, torch.device(device))


def _resolve_built_in(spec: str, weight: float, device: torch.device) -> Reward:
    name, colon, path = spec.partition(":")
    if name not in BUILT_IN:
        hint = suggest_name(name, BUILT_IN, otherwise="built in are")
        raise RewardError(f"no reward {name!r}; {hint} (your own: python:module:function)")
    row = BUILT_IN[name]
    if colon and (row.downloads is None or not Path(path).exists()):
        wrong = f"{path!r} does not exist" if row.downloads else "it has no weights"
        raise RewardError(
            f"reward {spec!r}: {wrong}; expected {name}, or for learned ones NAME:FOLDER with their files"
        )
    module = row.module or name
    options: dict[str, Any] = {"folder": Path(path)} if colon else {}
    options |= {"variant": row.variant} if row.variant else {}
    factory = getattr(import_module(f"texforce_hub.rewards.{module}"), module)
    return Reward(name, factory(device, **options), weight, row.differentiable)


def resolve_rewards(specs: Sequence[str], device: str | torch.device = "cpu") -> list[Reward]:
    """Several rewards, all different.

    Raises:
        RewardError: as :func:`resolve_reward`, or one is named twice.
    """
    rewards = [resolve_reward(spec, device) for spec in specs]
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise RewardError(f"reward {name!r} is given twice; give it once, with a weight: {name}=2")
    return rewards


@torch.no_grad()
def score_images(rewards: Sequence[Reward], images: Tensor, prompts: Sequence[str], *, batch: int) -> Tensor:
    """Every reward of every picture, ``(rewards, b)``, ``batch`` pictures at a time, without gradient.

    Raises:
        RewardError: a reward cannot be used; the message names the prompt.
    """
    starts = range(0, len(prompts), batch)
    rows = [[reward(images[i : i + batch], prompts[i : i + batch]) for i in starts] for reward in rewards]
    return torch.stack([torch.cat(row) for row in rows])
