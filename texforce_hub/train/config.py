"""Every knob of a training run: one frozen value, from defaults, a TOML file and the command line."""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from texforce_hub.errors import ConfigError
from texforce_hub.settings import ABOVE_ZERO, Count, Natural, NotNegative, Positive, Settings, Share, at_least


@dataclass(frozen=True)
class TrainConfig(Settings):
    """What to train, on what, for how long; the defaults suit the embedded ``shapes`` pipeline.

    Raises:
        ConfigError: a value that is out of its range, or of another type.
    """

    output: str  # folder of the run: adapter, checkpoints, metrics, pictures
    base: str = "shapes"  # the pipeline: "shapes", a folder, a single file, or a Hub id
    reward: tuple[str, ...] = ("alignment",)  # rewards, each NAME or NAME=WEIGHT
    prompts: str | None = None  # file with a prompt a line; "shapes:colour", "shapes:shape" or "shapes:both"
    canonical: Share = 0.625  # of the shapes prompts, the share whose words the base already knows
    negative_prompt: str = ""  # what guidance steers away from
    steps: Count = 80  # rollouts, each followed by its updates
    seed: int = 0  # of everything random; the same seed gives the same adapter (on CPU, bit for bit)
    device: str | None = None  # where to run; by default a GPU if there is one
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the frozen weights; the LoRA is float32
    resolution: Annotated[int | None, at_least(8)] = None  # pictures' side in pixels; by default the U-Net's own
    batch_size: Count = 64  # pictures in one U-Net call; lower it when memory runs out, the result is the same

    rank: Count = 16  # of the LoRA
    alpha: Positive = 16.0  # the LoRA's change is alpha / rank · up @ down

    prompts_per_step: Count = 8  # different prompts in a rollout
    images_per_prompt: Annotated[int, at_least(2)] = 16  # pictures of each: the group that advantages are relative to
    inference_steps: Count = 10  # denoising steps of a rollout
    guidance: NotNegative = 3.0  # of the rollouts, at most 1 for none; low, so that a prompt's pictures differ enough
    eta: Annotated[Share, ABOVE_ZERO] = 1.0  # noise of the DDIM steps: 1 is ancestral; 0 would leave no choice
    uncond: Literal["detach", "base", "full"] = "detach"  # negative prompt: adapted encoder without or with
    # gradient ("detach", "full"), or the frozen encoder ("base")

    train_timesteps: Count = 5  # denoising steps of each picture that are trained on, drawn anew every time
    skip_last: Natural = 1  # final denoising steps never trained on: their noise is too small to be a choice
    updates: Count = 2  # optimiser steps per pass over a rollout, each on its share of the pictures
    passes: Count = 1  # passes over a rollout
    clip: Positive = 1e-2  # PPO: a ratio further from 1 than this earns no gradient
    advantage_clip: NotNegative = 5.0  # advantages are cut at ± this
    advantage_floor: NotNegative = 1.0  # added to a group's deviation: where pictures hardly differ, keep still
    kl: NotNegative = 0.0  # weight of the Kullback–Leibler divergence from the base, 0 = none

    learning_rate: Positive = 2e-3  # of AdamW, after warm-up
    warmup: Natural = 3  # steps over which the learning rate rises to its value
    decay: Literal["constant", "linear", "cosine"] = "linear"  # the learning rate's way to 0 at the last step
    beta1: Share = 0.9  # AdamW
    beta2: Share = 0.99  # AdamW
    weight_decay: NotNegative = 1e-4  # AdamW
    max_grad_norm: Positive = 1.0  # the gradient is scaled down to this norm
    ema: Share = 0.0  # decay of a running average of the LoRA, a step; what is then kept is the average

    validate_every: Natural = 10  # steps between validations, 0 = none
    validation_prompts: Count = 32  # prompts of a validation, like the training's own; the noise is always the same
    validation_images: Count = 2  # pictures of each
    validation_steps: Count = 15  # denoising steps of a validation picture, without noise (eta 0)
    keep: Literal["best", "last"] = "best"  # the weights in the finished file: best in validation, or the last

    checkpoint_every: Count = 10  # steps between checkpoints
    checkpoints: Count = 2  # how many checkpoints stay on disk
    sheet_every: Natural = 20  # steps between sample sheets, 0 = only before and after

    def __post_init__(self) -> None:
        self.check()
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


# What may differ when a run is taken up again: where it lies and runs, how long and how often – not what it does.
RESUMABLE = frozenset({"output", "steps", "device", "checkpoint_every", "checkpoints", "sheet_every"})


def make_config(settings: dict[str, Any]) -> TrainConfig:
    """A config from settings by name; lists become tuples, a single reward a list of one.

    Raises:
        ConfigError: a name that does not exist (the nearest is named), or a value that cannot be.
    """
    if "output" not in settings:
        raise ConfigError('no output folder; give --output DIR, or output = "DIR" in the config file')
    if isinstance(settings.get("reward"), str):
        settings = settings | {"reward": [settings["reward"]]}
    return TrainConfig.from_table(settings)


def differing(config: TrainConfig, other: TrainConfig) -> list[str]:
    """Names of the settings that would make another run of it."""
    names = [field.name for field in fields(TrainConfig) if field.name not in RESUMABLE]
    return [name for name in names if getattr(config, name) != getattr(other, name)]
