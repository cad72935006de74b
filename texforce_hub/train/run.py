"""A training run from start to finish; it can be stopped at any moment and goes on where it was."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from time import monotonic
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Generator, Tensor

from texforce_hub.adapter.value import Adapter
from texforce_hub.device import no_denormals
from texforce_hub.errors import ConfigError, NotBetterError, PromptError, RewardError, TrainingError
from texforce_hub.files.checkpoint import State, read_checkpoint, write_checkpoint
from texforce_hub.files.lock import own_folder
from texforce_hub.generate.prompts.emphasis import Emphasis
from texforce_hub.generate.prompts.sets import PromptSet, load_prompts, read_prompts
from texforce_hub.generate.prompts.weighting import find_cut
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.rewards.reward import resolve_rewards, score_images
from texforce_hub.train.algorithms.algorithm import Algorithm
from texforce_hub.train.algorithms.direct import direct
from texforce_hub.train.algorithms.ppo import ppo
from texforce_hub.train.algorithms.streaming import streaming
from texforce_hub.train.config import TrainConfig, differing, make_config
from texforce_hub.train.judge import Judge
from texforce_hub.train.learner import Learner
from texforce_hub.train.lora import attach_lora, describe_run, load_lora, read_lora, read_scales
from texforce_hub.train.memory import fit_batch
from texforce_hub.train.policies.stable_diffusion import StableDiffusion, frozen, sample_images
from texforce_hub.train.run_folder import ADAPTER, RunFolder, Trackers

ALGORITHMS: dict[str, Algorithm] = {"streaming": streaming, "ppo": ppo, "direct": direct}
_LOG = logging.getLogger("texforce_hub")
_SHEET_PROMPTS = 8


@dataclass(frozen=True)
class StepReport:
    """What happened in a step; with ``facts`` laid flat, one line of ``metrics.jsonl``."""

    step: int  # counted from 1
    steps: int  # of the whole run
    reward: float  # weighted sum of the rewards, mean over the rollout
    rewards: dict[str, float]  # each reward's mean
    group_std: float  # mean standard deviation of the weighted sum within a prompt's pictures
    flat_groups: int  # prompts whose pictures all got the same
    learning_rate: float
    grad_norm: float  # of the algorithm's own gradient
    shift: float  # root mean square of what the embeddings of this step's prompts have moved from the base's
    seconds: dict[str, float]  # of the step's phases
    validation: float | None  # mean reward on the validation prompts, in the steps that validate
    facts: dict[str, float] = field(repr=False)  # what else the algorithm noticed

    def flat(self) -> dict[str, Any]:
        """As JSON can hold it."""
        facts = asdict(self)
        return {"clipped": 0.0, "kl_old": 0.0, **facts.pop("facts"), **facts}  # without ppo nothing can be clipped


@dataclass
class TrainingRun:
    """The machinery of one run."""

    config: TrainConfig
    policy: StableDiffusion
    learner: Learner
    prompts: PromptSet
    judge: Judge
    watch: Judge
    folder: RunFolder
    started: float = field(default_factory=monotonic)

    def take_step(self) -> StepReport:
        """One rollout, its rewards, and its updates.

        Raises:
            RewardError: a reward cannot be used; nothing was updated.
            TrainingError: the gradient is not finite.
        """
        config, learner, policy, judge = self.config, self.learner, self.policy, self.judge
        torch.manual_seed(_mix(config.seed, learner.step, 0))  # for a reward that draws random numbers
        texts = self.prompts.draw(learner.step, config.prompts_per_step, config.seed)
        anchors = self.prompts.anchors(learner.step, config.anchor_count, config.seed)
        rate, updates, norms = learner.set_learning_rate(), [], []
        began, learning = monotonic(), 0.0
        for update in ALGORITHMS[config.algorithm](policy, texts, judge, self._generator(1)):
            before = monotonic()
            norms.append(learner.learn(policy, policy.texts(texts), update.cotangents, anchors))
            updates.append(update.facts)
            learning += monotonic() - before
        learner.finish_step()
        seconds = {"rollout": monotonic() - began - learning, "update": learning}
        before = monotonic()
        validation = self.validate() if self.due(config.validate_every) else None
        total = judge.total(judge.scores)
        return StepReport(
            step=learner.step,
            steps=config.steps,
            reward=total.mean().item(),
            rewards={r.name: row.mean().item() for r, row in zip(judge.rewards, judge.scores, strict=True)},
            group_std=total.view(len(texts), -1).std(1).mean().item(),
            flat_groups=judge.flat_groups,
            learning_rate=rate,
            grad_norm=sum(norms) / len(norms),
            shift=self._shift(texts),
            seconds=seconds | {"validation": monotonic() - before},
            validation=validation,
            facts={name: sum(facts[name] for facts in updates) / len(updates) for name in updates[0]},
        )

    def validate(self) -> float:
        """The mean reward on the validation prompts at fixed noise; remembers the best weights, warns of hacking."""
        config, number = self.config, self.config.validation_images
        texts = self.prompts.sample(config.validation_prompts)
        with self.learner.averaged():
            images = sample_images(self.policy, texts, images=number, steps=config.validation_steps, seed=0)
        drawn = [text for text in texts for _ in range(number)]
        scores = self.judge.total(score_images(self.judge.rewards, images, drawn, batch=self.policy.config.batch_size))
        self.learner.note_validation(scores.mean().item())
        if self.watch.rewards:
            rows = score_images(self.watch.rewards, images, drawn, batch=self.policy.config.batch_size)
            self._watch(self.watch.total(rows))
        elif _has_fallen(scores, self.learner.validations[0][1]):
            _LOG.warning("step %d: the held-out reward is below where it began", self.learner.step)
        return scores.mean().item()

    def _watch(self, scores: Tensor) -> None:
        """Remember what the rewards that are not trained on say; warn if they fall while the others rise."""
        learner = self.learner
        learner.watched.append((learner.step, scores.mean().item()))
        rose = learner.validations[-1][1] > learner.validations[0][1]
        if rose and _has_fallen(scores, learner.watched[0][1]):
            names = ", ".join(reward.name for reward in self.watch.rewards)
            pair = learner.watched[0][1], learner.watched[-1][1]
            _LOG.warning(
                "reward hacking suspected at step %d: held out, the reward rose, but %s fell, %.3f to %.3f",
                learner.step, names, *pair,
            )  # fmt: skip

    def adapter(self) -> Adapter:
        """The weights that the run has to show, as an adapter."""
        step, weights = self.learner.kept
        return read_lora(weights, read_scales(self.policy.encoder), describe_run(self.config, step))

    def save(self, state: State) -> None:
        """Write a checkpoint, and the adapter as it is now if it is better than nothing."""
        write_checkpoint(self.folder.path, state, keep=self.config.checkpoints)
        if self.learner.beaten:
            write_adapter(self.adapter(), self.folder.path / ADAPTER)

    def draw(self) -> None:
        """The sheet – the same prompts at the same noise, by the base and now – and the run's plots."""
        samples = self.config.samples
        texts = list(read_prompts(samples)) if samples else self.prompts.sample(_SHEET_PROMPTS)
        step, steps = self.learner.step, self.config.validation_steps
        with self.learner.averaged():
            policies = (self.policy.reference, self.policy)
            columns = [sample_images(policy, texts, images=1, steps=steps, seed=1) for policy in policies]
        self.folder.write_sheet(columns, texts, ["base", f"step {step}"], step=step)
        self.folder.write_curve(self.learner.validations)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, the time is up, or there has been no new best for long."""
        config, learner = self.config, self.learner
        minutes = (monotonic() - self.started) / 60
        late = config.max_minutes is not None and minutes >= config.max_minutes
        waited = [step for step, _ in learner.validations if step > learner.best_step]
        return learner.step >= config.steps or late or bool(config.patience and len(waited) >= config.patience)

    def due(self, every: int) -> bool:
        """Whether the step just taken is one of every so many, or the last."""
        return bool(every) and (self.learner.step % every == 0 or self.finished)

    @torch.no_grad()
    def _shift(self, texts: list[str]) -> float:
        shift = self.policy.encode(texts) - self.policy.reference.encode(texts)
        return shift.square().mean().sqrt().item()

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
        PromptError, RewardError: prompts or a reward cannot be found, or prompts are too long to be read.
        NotBetterError: no step was better than the base on the held-out prompts; no adapter is written.
        TrainingError: another process trains there, or the run cannot go on; the message says why.

    Example:
        >>> from texforce_hub import TrainConfig, train_adapter
        >>> config = TrainConfig(base="shapes", reward=("alignment",), output="run", steps=80)
        >>> train_adapter(config)  # doctest: +SKIP
    """
    # A reward may draw from torch's own random numbers: the caller's state of them is put back.
    with own_folder(config.output) as folder, no_denormals(), torch.random.fork_rng(devices=[]):
        run = make_run(config, pipeline, RunFolder(folder))
        with frozen(run.policy.pipeline, checkpointing=config.checkpointing, tiling=config.tiling):
            _start(run)
            _train(run, on_step or (lambda _: None))
        if not run.learner.beaten:
            if run.learner.step == 0:
                raise NotBetterError("the time was up before the first step was taken; no adapter is written")
            first, best = run.learner.validations[0][1], max(score for _, score in run.learner.validations[1:])
            raise NotBetterError(
                f"no step beat the {'adapter it began with' if config.init else 'base'} on the held-out prompts "
                f"({best:.3f} at best, {first:.3f} before), so no adapter is written; take more steps or another "
                f'learning rate, or give keep = "last"; the last weights are in checkpoint-{run.learner.step}'
            )
        return run.adapter()


def make_run(config: TrainConfig, pipeline: Any, folder: RunFolder) -> TrainingRun:
    """Load what a run needs.

    Raises:
        ConfigError, PromptError, RewardError, TrainingError: as :func:`train_adapter`.
    """
    prompts = load_prompts(config.prompts, base=config.base, canonical=config.canonical, anchors=config.anchor_prompts)
    if pipeline is None:
        pipeline = load_pipeline(config.base, unet=config.unet, device=config.device, dtype=config.dtype)
    _check_pipeline(pipeline)
    if not config.allow_cut:
        _refuse_cut(pipeline, [*prompts.texts(), config.negative_prompt])
    rewards, watch = (resolve_rewards(names, pipeline.unet.device) for names in (config.reward, config.watch))
    encoder, parameters = attach_lora(pipeline.text_encoder, config, seed=_mix(config.seed, 0, 3))
    if config.init is not None:
        load_lora(parameters, read_scales(encoder), read_adapter(config.init))
    # Latents have no range to be clipped to, whatever an old configuration leaves unsaid.
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, thresholding=False)
    policy = StableDiffusion(pipeline, encoder, scheduler, config)
    learner = Learner(parameters, config)
    run = TrainingRun(config, policy, learner, prompts, Judge(rewards, config), Judge(watch, config), folder)
    set_batch_size(run, config.batch_size or fit_batch(policy))
    return run


def set_batch_size(run: TrainingRun, size: int) -> None:
    """So many pictures in a U-Net call from now on."""
    run.policy = replace(run.policy, config=replace(run.config, batch_size=size))
    run.judge.config = run.policy.config
    run.learner.batch_size = size


def _start(run: TrainingRun) -> None:
    state = read_checkpoint(run.folder.path)
    if state is None:
        run.folder.write_config(run.config)
        run.folder.trim_metrics(0)
        if run.config.validate_every:
            _LOG.info("validation before training: %.3f", run.validate())
        return
    changed = differing(run.config, _read_config(state, run.config))
    if changed:
        was = ", ".join(f"{name} was {state.facts['config'].get(name)!r}" for name in changed)
        raise ConfigError(f"{run.folder.path} holds a run with other settings ({was}); use them, or another --output")
    if (before := state.facts["threads"]) != (now := torch.get_num_threads()):
        _LOG.warning("the checkpoint was made with %d threads, not %d: the last bits may differ", before, now)
    run.learner.restore(state)
    set_batch_size(run, run.learner.batch_size)
    run.folder.trim_metrics(state.step)
    if run.due(run.config.sheet_every) and not run.folder.has_sheet(state.step):
        run.draw()  # it was killed between the checkpoint and the sheet
    _LOG.info("resuming from step %d", state.step)


def _read_config(state: State, config: TrainConfig) -> TrainConfig:
    try:
        return make_config({**state.facts["config"], "output": config.output})
    except ConfigError as error:
        raise ConfigError(
            f"{config.output} holds a run of an older version ({error}); give another --output"
        ) from error


def _train(run: TrainingRun, on_step: Callable[[StepReport], None]) -> None:
    saved = run.learner.snapshot()
    try:
        with Trackers(run.config) as trackers:
            while not run.finished:
                try:
                    report = run.take_step()
                except torch.OutOfMemoryError:
                    run.learner.restore(saved)
                    _take_smaller_slices(run)
                    continue
                run.folder.append_metrics(report.flat())
                trackers.log(report.flat())
                saved = run.learner.snapshot()
                if run.due(run.config.checkpoint_every):
                    run.save(saved)
                if run.due(run.config.sheet_every):
                    run.draw()
                on_step(report)
    except BaseException as error:
        run.learner.restore(saved)
        run.save(saved)
        _explain(error, saved.step)
        raise
    if run.config.validate_every and run.learner.validations[-1][0] < run.learner.step:  # the time was up
        run.validate()
        saved = run.learner.snapshot()
    run.save(saved)
    run.draw()


def _take_smaller_slices(run: TrainingRun) -> None:
    """Half as many pictures in a U-Net call; the result is the same but for rounding."""
    size = run.policy.config.batch_size
    if size == 1:
        raise TrainingError("out of memory with one picture at a time; give --preset 8gb, or a smaller resolution")
    _LOG.warning("out of memory with %d pictures in a U-Net call; going on with %d", size, size // 2)
    set_batch_size(run, size // 2)
    torch.cuda.empty_cache()


def _explain(error: BaseException, step: int) -> None:
    """Raise what went wrong in the step after ``step`` as one line, if it is something that can be helped."""
    if isinstance(error, ConfigError | RewardError | TrainingError):
        raise TrainingError(f"step {step + 1}: {error}; the state before it is in checkpoint-{step}") from error


def _has_fallen(scores: Tensor, first: float) -> bool:
    """Whether a mean is below an earlier one by more than two standard errors."""
    return len(scores) > 1 and scores.mean().item() < first - 2 * scores.std().item() / len(scores) ** 0.5


def _refuse_cut(pipeline: Any, texts: list[str]) -> None:
    for prompt, limit, cut in find_cut(pipeline, [Emphasis(((text, 1.0),)) for text in texts if text]):
        raise PromptError(
            f"{prompt.text!r} is longer than the text encoder's {limit} tokens: {cut!r} would not be read, "
            "while the reward is asked about all of it; shorten it, or give --allow-cut"
        )


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
