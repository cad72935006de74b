"""A training run from start to finish; it can be stopped at any moment and goes on where it was."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Generator, Tensor

from texforce_hub.adapter.value import Adapter
from texforce_hub.device import no_denormals
from texforce_hub.errors import ConfigError, RewardError, TrainingError
from texforce_hub.files.checkpoint import State, read_checkpoint, write_checkpoint
from texforce_hub.files.lock import own_folder
from texforce_hub.generate.prompts.sets import PromptSet, load_prompts
from texforce_hub.hub.write import write_adapter
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.rewards.reward import Reward, resolve_rewards, score_images
from texforce_hub.train.algorithms.ppo import group_advantages, update_policy
from texforce_hub.train.config import TrainConfig, differing, make_config
from texforce_hub.train.learner import Learner
from texforce_hub.train.lora import attach_lora, describe_run, read_lora
from texforce_hub.train.policies.rollout import sample_images, sample_rollout
from texforce_hub.train.policies.stable_diffusion import Policy, frozen
from texforce_hub.train.run_folder import ADAPTER, RunFolder

_LOG = logging.getLogger("texforce_hub")
_SHEET_PROMPTS = 8


@dataclass(frozen=True)
class StepReport:
    """What happened in a step; one line of ``metrics.jsonl``."""

    step: int  # counted from 1
    steps: int  # of the whole run
    reward: float  # weighted sum of the rewards, mean over the rollout
    rewards: dict[str, float]  # each reward's mean
    group_std: float  # mean standard deviation of the weighted sum within a prompt's pictures
    learning_rate: float
    clipped: float  # share of ratios outside the clip range
    kl_old: float  # divergence from the rollout's policy
    kl_base: float  # divergence from the base, measured only with kl > 0
    grad_norm: float  # before it was scaled down
    seconds: float
    validation: float | None  # mean reward on the validation prompts, in the steps that validate


@dataclass
class TrainingRun:
    """The machinery of one run."""

    config: TrainConfig
    policy: Policy
    learner: Learner
    prompts: PromptSet
    rewards: Sequence[Reward]
    folder: RunFolder

    def take_step(self) -> StepReport:
        """One rollout, its rewards, and its updates.

        Raises:
            RewardError: a reward cannot be used; nothing was updated.
            TrainingError: the gradient is not finite.
        """
        config, learner, started = self.config, self.learner, monotonic()
        torch.manual_seed(_mix(config.seed, learner.step, 0))  # for a reward that draws random numbers
        texts = self.prompts.draw(learner.step, config.prompts_per_step, config.seed)
        rollout = sample_rollout(self.policy, texts, self._generator(1))
        drawn = [texts[i] for i in rollout.group]
        scores = score_images(self.rewards, rollout.images, drawn, batch=config.batch_size)
        rate, advantages = learner.set_learning_rate(), self._advantages(scores)
        facts = update_policy(
            self.policy, rollout, advantages, learner.optimizer, list(learner.parameters.values()), self._generator(2)
        )
        learner.finish_step()
        total = self._weighted(scores)
        return StepReport(
            step=learner.step,
            steps=config.steps,
            reward=total.mean().item(),
            rewards={r.name: row.mean().item() for r, row in zip(self.rewards, scores, strict=True)},
            group_std=total.view(len(texts), -1).std(1).mean().item(),
            learning_rate=rate,
            **asdict(facts),
            validation=self.validate() if self.due(config.validate_every) else None,
            seconds=monotonic() - started,
        )

    def validate(self) -> float:
        """The mean reward on the validation prompts at fixed noise; remembers the best weights."""
        config, number = self.config, self.config.validation_images
        texts = self.prompts.sample(config.validation_prompts)
        with self.learner.averaged():
            images = sample_images(self.policy, texts, images=number, steps=config.validation_steps, seed=0)
        drawn = [text for text in texts for _ in range(number)]
        score = self._weighted(score_images(self.rewards, images, drawn, batch=config.batch_size)).mean().item()
        self.learner.note_validation(score)
        return score

    def adapter(self) -> Adapter:
        """The weights that the run has to show, as an adapter."""
        step, weights = self.learner.kept
        metadata = describe_run(self.config, step)
        return read_lora(weights, rank=self.config.rank, alpha=self.config.alpha, metadata=metadata)

    def save(self, state: State) -> None:
        """Write a checkpoint, and the adapter as it is now."""
        write_checkpoint(self.folder.path, state, keep=self.config.checkpoints)
        write_adapter(self.adapter(), self.folder.path / ADAPTER)

    def draw(self) -> None:
        """The sheet – the same prompts at the same noise, by the base and now – and the reward's curve."""
        texts, step, steps = self.prompts.sample(_SHEET_PROMPTS), self.learner.step, self.config.validation_steps
        with self.learner.averaged():
            policies = (self.policy.reference, self.policy)
            columns = [sample_images(policy, texts, images=1, steps=steps, seed=1) for policy in policies]
        self.folder.write_sheet(columns, texts, ["base", f"step {step}"], step=step)
        self.folder.write_curve(self.learner.validations)

    def due(self, every: int) -> bool:
        """Whether the step just taken is one of every so many, or the last."""
        return bool(every) and (self.learner.step % every == 0 or self.learner.step == self.config.steps)

    def _weighted(self, scores: Tensor) -> Tensor:
        return torch.stack([r.weight * row for r, row in zip(self.rewards, scores, strict=True)]).sum(0)

    def _advantages(self, scores: Tensor) -> Tensor:
        """Every reward's own group advantages, by weight: rewards on different scales count alike."""
        groups, config = scores.view(-1, self.config.images_per_prompt), self.config
        advantages = group_advantages(groups, floor=config.advantage_floor, clip=config.advantage_clip)
        return self._weighted(advantages.view_as(scores)) / sum(abs(reward.weight) for reward in self.rewards)

    def _generator(self, purpose: int) -> Generator:
        return Generator().manual_seed(_mix(self.config.seed, self.learner.step, purpose))


def train_adapter(
    config: TrainConfig, *, pipeline: Any = None, on_step: Callable[[StepReport], None] | None = None
) -> Adapter:
    """Train a LoRA on the text encoder of a pipeline and write it to ``config.output``.

    If the folder holds a run with the same settings, it goes on from its newest checkpoint and ends, on the
    CPU with the same number of threads, with the same bits as a run that was never stopped. Whatever stops
    it – an exception, Ctrl-C – the state after the last whole step is saved before the exception goes on.

    ``pipeline`` is used as it is instead of loading ``config.base``; it is not changed. ``on_step`` is called
    after every step.

    Raises:
        ConfigError: the folder holds a run with other settings.
        PromptError, RewardError: prompts or a reward cannot be found.
        TrainingError: another process trains there, or the run cannot go on; the message says why.
    """
    prompts = load_prompts(config.prompts, base=config.base, canonical=config.canonical)
    # A reward may draw from torch's own random numbers: the caller's state of them is put back.
    with own_folder(config.output) as folder, no_denormals(), torch.random.fork_rng(devices=[]):
        run = _make_run(config, pipeline, prompts, RunFolder(folder))
        with frozen(run.policy.pipeline):
            _start(run)
            _train(run, on_step or (lambda _: None))
        return run.adapter()


def _make_run(config: TrainConfig, pipeline: Any, prompts: PromptSet, folder: RunFolder) -> TrainingRun:
    if pipeline is None:
        pipeline = load_pipeline(config.base, device=config.device, dtype=config.dtype)
    _check_pipeline(pipeline)
    rewards = resolve_rewards(config.reward, pipeline.unet.device)
    seed = _mix(config.seed, 0, 3)
    encoder, parameters = attach_lora(pipeline.text_encoder, rank=config.rank, alpha=config.alpha, seed=seed)
    # Latents have no range to be clipped to, whatever an old configuration leaves unsaid.
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, thresholding=False)
    learner = Learner(parameters, config)
    return TrainingRun(config, Policy(pipeline, encoder, scheduler, config), learner, prompts, rewards, folder)


def _start(run: TrainingRun) -> None:
    state = read_checkpoint(run.folder.path)
    if state is None:
        run.folder.write_config(run.config)
        run.folder.trim_metrics(0)
        if run.config.validate_every:
            _LOG.info("validation before training: %.3f", run.validate())
        return
    changed = differing(run.config, make_config({**state.facts["config"], "output": run.config.output}))
    if changed:
        was = ", ".join(f"{name} was {state.facts['config'].get(name)!r}" for name in changed)
        raise ConfigError(f"{run.folder.path} holds a run with other settings ({was}); use them, or another --output")
    if (before := state.facts["threads"]) != (now := torch.get_num_threads()):
        _LOG.warning("the checkpoint was made with %d threads, not %d: the last bits may differ", before, now)
    run.learner.restore(state)
    run.folder.trim_metrics(state.step)
    _LOG.info("resuming from step %d", state.step)


def _train(run: TrainingRun, on_step: Callable[[StepReport], None]) -> None:
    saved = run.learner.snapshot()
    try:
        while run.learner.step < run.config.steps:
            report = run.take_step()
            run.folder.append_metrics(asdict(report))
            saved = run.learner.snapshot()
            if run.due(run.config.checkpoint_every):
                run.save(saved)
            if run.due(run.config.sheet_every):
                run.draw()
            on_step(report)
    except BaseException as error:
        run.learner.restore(saved)
        run.save(saved)
        _explain(error, run, saved.step)
        raise
    run.save(saved)
    run.draw()


def _explain(error: BaseException, run: TrainingRun, step: int) -> None:
    """Raise what went wrong in the step after ``step`` as one line, if it is something that can be helped."""
    kept = f"the state before it is in checkpoint-{step}"
    if isinstance(error, RewardError | TrainingError):
        raise TrainingError(f"step {step + 1}: {error}; {kept}") from error
    if isinstance(error, torch.OutOfMemoryError):
        lower = f"lower batch_size from {run.config.batch_size} to {max(1, run.config.batch_size // 2)}"
        raise TrainingError(f"step {step + 1}: out of memory; {lower}; {kept}") from error


def _check_pipeline(pipeline: Any) -> None:
    missing = [part for part in ("tokenizer", "text_encoder", "unet", "vae") if getattr(pipeline, part, None) is None]
    if missing or getattr(pipeline, "text_encoder_2", None) is not None:
        what = f"has no {missing[0]}" if missing else "has two text encoders"
        raise TrainingError(
            f"{type(pipeline).__name__} {what}; training needs a Stable Diffusion 1.x or 2.x pipeline: "
            "one CLIP text encoder, a U-Net and a VAE"
        )


def _mix(seed: int, step: int, purpose: int) -> int:
    """A seed for one purpose of one step."""
    return ((seed * 1_000_003 + step) * 8 + purpose) % 2**63
