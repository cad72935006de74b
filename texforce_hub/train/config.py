"""Every knob of a training run: one frozen value, from defaults, a TOML file and the command line."""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from texforce_hub.device import spell_dtype
from texforce_hub.errors import ConfigError
from texforce_hub.settings import ABOVE_ZERO, UNIT, Count, Natural, NotNegative, Positive, Settings, Share, at_least


@dataclass(frozen=True)
class TrainConfig(Settings):
    """What to train, on what, for how long; the defaults suit the embedded ``shapes`` pipeline.

    Raises:
        ConfigError: a value that is out of its range, or of another type.
    """

    output: str  # folder of the run: adapter, checkpoints, metrics, pictures
    base: str = "shapes"  # the pipeline: "shapes", "shapes-turbo", a folder, a single file, or a Hub id
    unet: str | None = None  # another U-Net for it: the adapter is then for that one
    init: str | None = None  # an adapter to go on from; None: from nothing
    reward: tuple[str, ...] = ("alignment",)  # rewards, each NAME or NAME=WEIGHT
    watch: tuple[str, ...] = ()  # rewards that are not trained on: if they part from the others, that is said
    prompts: str | None = None  # a list: file with a prompt a line, "file.csv:column", "hub:owner/name", a .toml of
    # templates; or "shapes:colour", "shapes:shape", "shapes:both"
    canonical: Share = 0.0  # of the shapes prompts, the share whose words the base already knows
    anchor_prompts: str | None = None  # file of prompts to leave alone; default: known words of shapes, else prompts
    samples: str | None = None  # file of prompts to draw on the sheets; by default held-out ones
    negative_prompt: str = ""  # what guidance steers away from
    allow_cut: bool = False  # train on prompts that are longer than the text encoder, cut
    steps: Count = 120  # rollouts, each followed by its updates
    max_minutes: Annotated[float | None, ABOVE_ZERO] = (
        None  # after so long, no more steps are begun; validations follow
    )
    seed: int = 0  # of everything random; the same seed gives the same adapter (on CPU, bit for bit)
    device: str | None = None  # where to run; by default a GPU if there is one
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the frozen weights; the LoRA is float32
    resolution: Annotated[int | None, at_least(8)] = None  # pictures' side in pixels; by default the U-Net's own
    batch_size: Natural = 0  # pictures in one U-Net call; 0: as many as memory holds, at most 64
    checkpointing: bool = False  # recompute the U-Net's activations: a sixth of the memory, a third more work
    offload: bool = False  # keep on the CPU what is not at work: decoder, text encoders, learned rewards
    tiling: bool = False  # decode pictures one at a time, large ones in tiles
    decoder: str | None = None  # a small decoder (AutoencoderTiny) for rollouts and sheets: a folder, or a Hub id

    rank: Count = 16  # of the LoRA
    alpha: Positive = 16.0  # the LoRA's change is alpha / rank · up @ down
    target: Literal["attention", "mlp", "all"] = "attention"  # which layers of the text encoder carry it
    rank_pattern: tuple[str, ...] = ()  # ranks of some layers, each PATTERN=RANK, such as "layers.0=8"
    alpha_pattern: tuple[str, ...] = ()  # alphas of some layers, each PATTERN=ALPHA

    prompts_per_step: Count = 4  # different prompts in a rollout
    images_per_prompt: Annotated[int, at_least(2)] = 4  # pictures of each: the group that advantages are relative to
    inference_steps: Count = 10  # denoising steps of a rollout
    guidance: NotNegative = 3.0  # of the rollouts, at most 1 for none; low, so that a prompt's pictures differ enough
    eta: Annotated[float | None, ABOVE_ZERO, UNIT] = None  # noise of the denoising steps: of DDIM's, 1 is ancestral and
    # the default; of rectified flow's, it is Flow-GRPO's noise level, by default 0.7; 0 would leave no choice
    uncond: Literal["detach", "base", "full"] = "detach"  # negative prompt: adapted encoder without or with
    # gradient ("detach", "full"), or the frozen encoder ("base")

    algorithm: Literal["streaming", "ppo", "direct"] = "streaming"  # how to learn from a rollout
    share: Annotated[Share, ABOVE_ZERO] = 0.5  # of the steps that carry signal, the first so many are trained on
    train_timesteps: Annotated[int | None, at_least(1)] = None  # ppo: of those, how many a picture; None: all
    updates: Count = 1  # ppo: optimiser steps per pass over a rollout, each on its share of the pictures
    passes: Count = 1  # ppo: passes over a rollout
    clip: Positive = 1.64  # ppo: a log-ratio further from 0 than this, in nats, earns no gradient
    direct: Literal["refl", "draft_lv", "truncated"] = "refl"  # direct: through which steps the reward is pushed
    direct_steps: Count = 1  # direct, truncated: the last so many
    antithetic: bool = True  # draw a prompt's pictures in pairs, from one start with opposite noise in the steps
    leave_one_out: bool = False  # compare a picture with the others of its group, not with all
    advantage_clip: NotNegative = 5.0  # advantages are cut at ± this
    advantage_floor: NotNegative = 0.1  # added to a group's deviation, that of a single reward being 1
    anchor: NotNegative = 20.0  # pull of the anchor prompts' embeddings to where they were, against a gradient of 1
    anchor_count: Count = 64  # anchor prompts in an update; they cost the text encoder alone

    learning_rate: Positive = 3e-3  # of AdamW, after warm-up
    warmup: Natural = 3  # steps over which the learning rate rises to its value
    decay: Literal["constant", "linear", "cosine"] = "linear"  # the learning rate's way down
    decay_steps: Count = 120  # how many steps that takes, whatever the run's length: a longer run does not jump
    decay_floor: Share = 0.02  # of the learning rate, what is left then
    beta1: Share = 0.9  # AdamW
    beta2: Share = 0.99  # AdamW
    weight_decay: NotNegative = 1e-4  # AdamW
    ema: Share = 0.9  # decay of a running average of the LoRA, a step; what is then kept is the average

    validate_every: Natural = 20  # steps between validations, 0 = none
    validation_prompts: Count = 48  # prompts of a validation, none of them trained on; the noise is always the same
    validation_images: Count = 1  # pictures of each
    validation_steps: Annotated[int | None, at_least(1)] = None  # denoising steps of a validation picture, without
    # noise (eta 0); by default as many as in a rollout
    keep: Literal["best", "last"] = "best"  # the weights in the finished file: best in validation, or the last
    stretch: Annotated[float, at_least(1)] = 1.4  # at the end what was learned is tried at up to this multiple on the
    # validation prompts, and the best goes into the file; 1, or without validations: as it is
    patience: Natural = 0  # end after so many validations without a new best, 0 = never

    checkpoint_every: Count = 10  # steps between checkpoints
    checkpoints: Count = 2  # how many checkpoints stay on disk
    sheet_every: Natural = 40  # steps between sample sheets, 0 = only before and after
    track: tuple[str, ...] = ()  # also report to these: tensorboard, wandb, trackio

    def __post_init__(self) -> None:
        self.check()
        if not self.reward:
            raise ConfigError("no reward; expected at least one, such as 'alignment'")
        if self.updates > self.images:
            raise ConfigError(f"updates = {self.updates}, but a rollout has only {self.images} pictures to share out")

    @property
    def images(self) -> int:
        """Pictures in a rollout."""
        return self.prompts_per_step * self.images_per_prompt

    @property
    def picture_steps(self) -> int:
        """Denoising steps of a picture that is drawn to be judged, without noise."""
        return self.validation_steps or self.inference_steps


# What may differ when a run is taken up again: where it lies and runs, how long and how often – not what it does.
RESUMABLE = frozenset(
    {"output", "steps", "max_minutes", "patience", "device", "checkpoint_every", "checkpoints", "sheet_every"}
    | {"samples", "track", "offload"}
)

RENAMED = {"batch": "batch_size"}
GONE = {
    "skip_last": "denoising steps are chosen by the signal they carry: share = 0.5 takes the first half of those",
    "kl": "the anchor holds what the base knew: anchor = 20.0",
    "max_grad_norm": "the gradient is brought to norm 1 before every update",
}

PRESETS: dict[str, dict[str, Any]] = {
    "8gb": {"dtype": "bfloat16", "batch_size": 2, "checkpointing": True, "offload": True, "tiling": True},
    "24gb": {"dtype": "bfloat16", "batch_size": 16, "checkpointing": True},
    "80gb": {"dtype": "bfloat16", "batch_size": 16},
}
"""Settings for Stable Diffusion 1.5 at 512 × 512 on a GPU of that memory; docs/training.md says how they were found."""


def make_config(settings: dict[str, Any]) -> TrainConfig:
    """A config from settings by name; lists become tuples, a single reward a list of one.

    Raises:
        ConfigError: a name that does not exist (the nearest is named) or no longer does, or a value that cannot be.
    """
    if "output" not in settings:
        raise ConfigError('no output folder; give --output DIR, or output = "DIR" in the config file')
    for name in settings:
        if name in GONE:
            raise ConfigError(f"there is no option {name!r} any more: {GONE[name]}")
    settings = {RENAMED.get(name, name): value for name, value in settings.items()}
    if isinstance(dtype := settings.get("dtype"), str):
        settings["dtype"] = spell_dtype(dtype)
    lists = {name: [value] for name in ("reward", "watch", "track") if isinstance(value := settings.get(name), str)}
    return TrainConfig.from_table(settings | lists)


def unsaid(settings: dict[str, Any]) -> list[str]:
    """Settings, of those that make a run what it is, that are not among these."""
    said = {RENAMED.get(name, name) for name in settings}
    return [field.name for field in fields(TrainConfig) if field.name not in RESUMABLE | said]


def differing(config: TrainConfig, other: TrainConfig) -> list[str]:
    """Names of the settings that would make another run of it."""
    names = [field.name for field in fields(TrainConfig) if field.name not in RESUMABLE]
    return [name for name in names if getattr(config, name) != getattr(other, name)]
