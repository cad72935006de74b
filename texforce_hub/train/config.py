"""Every knob of a training run: one frozen value, from defaults, a TOML file and the command line."""

import json
import tomllib
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from texforce_hub.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, for how long; the defaults suit the embedded ``shapes`` pipeline.

    Raises:
        ConfigError: a value that is out of its range, or of another type.
    """

    output: str  # folder of the run: adapter, checkpoints, metrics, pictures
    base: str = "shapes"  # the pipeline: "shapes", a folder, a single file, or a Hub id
    reward: tuple[str, ...] = ("alignment",)  # rewards, each NAME or NAME=WEIGHT
    prompts: str | None = None  # file with a prompt a line; "shapes:colour", "shapes:shape" or "shapes:both"
    canonical: float = 0.5  # of the shapes prompts, the share whose words the base already knows
    negative_prompt: str = ""  # what guidance steers away from
    steps: int = 80  # rollouts, each followed by its updates
    seed: int = 0  # of everything random; the same seed gives the same adapter (on CPU, bit for bit)
    device: str | None = None  # where to run; by default a GPU if there is one
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the frozen weights; the LoRA is float32
    resolution: int | None = None  # pictures' side in pixels; by default what the U-Net was made for
    batch: int = 64  # pictures in one U-Net call; lower it when memory runs out, the result is the same

    rank: int = 16  # of the LoRA
    alpha: float = 16.0  # the LoRA's change is alpha / rank · up @ down

    prompts_per_step: int = 8  # different prompts in a rollout
    images_per_prompt: int = 16  # pictures of each: the group that advantages are relative to
    inference_steps: int = 10  # denoising steps of a rollout
    guidance: float = 3.0  # of the rollouts, at most 1 for none; low, so that a prompt's pictures differ enough
    eta: float = 1.0  # noise of the DDIM steps: 1 is ancestral sampling; 0 would leave nothing to reinforce
    uncond: Literal["detach", "base", "full"] = "detach"  # negative prompt: adapted encoder without or with
    # gradient ("detach", "full"), or the frozen encoder ("base")

    train_timesteps: int = 5  # denoising steps of each picture that are trained on, drawn anew every time
    skip_last: int = 1  # final denoising steps never trained on: their noise is too small to be a choice
    updates: int = 2  # optimiser steps per pass over a rollout, each on its share of the pictures
    passes: int = 1  # passes over a rollout
    clip: float = 1e-2  # PPO: a ratio further from 1 than this earns no gradient
    advantage_clip: float = 5.0  # advantages are cut at ± this
    advantage_floor: float = 1.0  # added to a group's standard deviation: where pictures hardly differ, keep still
    kl: float = 0.0  # weight of the Kullback–Leibler divergence from the base, 0 = none

    learning_rate: float = 2e-3  # of AdamW, after warm-up
    warmup: int = 3  # steps over which the learning rate rises to its value
    decay: Literal["constant", "linear", "cosine"] = "linear"  # the learning rate's way to 0 at the last step
    beta1: float = 0.9  # AdamW
    beta2: float = 0.99  # AdamW
    weight_decay: float = 1e-4  # AdamW
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm
    ema: float = 0.0  # decay of a running average of the LoRA, a step; what is then kept is the average

    validate_every: int = 10  # steps between validations, 0 = none
    validation_prompts: int = 32  # prompts of a validation, like the training's own; the noise is always the same
    validation_images: int = 2  # pictures of each
    validation_steps: int = 15  # denoising steps of a validation picture, without noise (eta 0)
    keep: Literal["best", "last"] = "best"  # the weights in the finished file: best in validation, or the last

    checkpoint_every: int = 10  # steps between checkpoints
    checkpoints: int = 2  # how many checkpoints stay on disk
    sheet_every: int = 20  # steps between sample sheets, 0 = only before and after

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), field.type)
        for name, low in _MINIMA.items():
            _check(name, value := getattr(self, name), value is None or value >= low, f"at least {low}")
        for name in _POSITIVE:
            _check(name, value := getattr(self, name), value > 0, "more than 0")
        for name in _SHARES:
            _check(name, value := getattr(self, name), 0 <= value <= 1, "a value from 0 to 1")
        if not self.reward:
            raise ConfigError("no reward; expected at least one, such as 'alignment'")
        if self.trainable_steps < 1:
            raise ConfigError(f"skip_last = {self.skip_last} leaves none of {self.inference_steps} steps to train on")
        if self.updates > self.images:
            raise ConfigError(f"updates = {self.updates}, but a rollout has only {self.images} pictures to share out")

    @property
    def images(self) -> int:
        """Pictures in a rollout."""
        return self.prompts_per_step * self.images_per_prompt

    @property
    def trainable_steps(self) -> int:
        """Denoising steps that may be trained on: all but the last few."""
        return self.inference_steps - self.skip_last


_MINIMA: dict[str, float] = {
    "steps": 0, "resolution": 8, "batch": 1, "prompts_per_step": 1, "images_per_prompt": 2, "inference_steps": 1,
    "guidance": 0, "train_timesteps": 1, "skip_last": 0, "updates": 1, "passes": 1, "advantage_floor": 0, "kl": 0,
    "warmup": 0, "weight_decay": 0, "validate_every": 0, "validation_prompts": 1, "validation_images": 1,
    "validation_steps": 1, "checkpoint_every": 1, "checkpoints": 1, "sheet_every": 0, "advantage_clip": 0,
}  # fmt: skip

_POSITIVE = ("rank", "alpha", "clip", "learning_rate", "eta", "max_grad_norm")
_SHARES = ("canonical", "ema", "beta1", "beta2", "eta")

# What may differ when a run is taken up again: where it lies and runs, how long and how often – not what it does.
RESUMABLE = frozenset({"output", "steps", "device", "checkpoint_every", "checkpoints", "sheet_every"})


def _check(name: str, value: Any, fine: bool, expected: str) -> None:  # noqa: FBT001
    if not fine:
        raise ConfigError(f"{name} = {value!r}; expected {expected}")


def _check_type(name: str, value: Any, kind: Any) -> None:
    if not _fits(value, kind):
        choices = get_args(kind) if get_origin(kind) is Literal else None
        expected = " or ".join(map(repr, choices)) if choices else _name_type(kind)
        raise ConfigError(f"{name} = {value!r}; expected {expected}")


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # NaN is no setting
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _name_type(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(_name_type(option) for option in get_args(kind) if option is not NoneType)
    if get_origin(kind) is tuple:
        return "a list of strings"
    return {int: "a whole number", float: "a number", str: "a string"}[kind]


def make_config(settings: dict[str, Any]) -> TrainConfig:
    """A config from settings by name; lists become tuples, a single reward a list of one.

    Raises:
        ConfigError: a name that does not exist (the nearest is named), or a value that cannot be.
    """
    known = [field.name for field in fields(TrainConfig)]
    for name in settings:
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(known)}"
            raise ConfigError(f"there is no training option {name!r}{hint}")
    if "output" not in settings:
        raise ConfigError('no output folder; give --output DIR, or output = "DIR" in the config file')
    reward = settings.get("reward", ())
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    if isinstance(reward, str):
        settings["reward"] = (reward,)
    return TrainConfig(**settings)


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file, a flat table of :class:`TrainConfig`'s names.

    Raises:
        ConfigError: there is no such file, or it is no TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def write_config(config: TrainConfig) -> str:
    """The config as TOML; inverse of ``make_config(tomllib.loads(...))``."""
    # A JSON string, number or list of strings is spelled the same in TOML.
    settings = {name: value for name, value in asdict(config).items() if value is not None}
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in settings.items())


def differing(config: TrainConfig, other: TrainConfig) -> list[str]:
    """Names of the settings that would make another run of it."""
    return [
        f.name
        for f in fields(TrainConfig)
        if f.name not in RESUMABLE and getattr(config, f.name) != getattr(other, f.name)
    ]
