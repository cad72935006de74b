"""A training run from start to finish; it can be stopped at any moment and goes on where it was."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from texforce_hub.adapter.value import Adapter
from texforce_hub.arguments import Pipeline, check_kind
from texforce_hub.device import no_denormals
from texforce_hub.errors import ConfigError, NotBetterError, PromptError, RewardError, TrainingError
from texforce_hub.files.checkpoint import State, read_checkpoint
from texforce_hub.files.lock import own_folder
from texforce_hub.generate.prompts.emphasis import Emphasis
from texforce_hub.generate.prompts.sets import load_prompts, read_prompts
from texforce_hub.generate.prompts.weighting import find_cut
from texforce_hub.hub.read import read_adapter
from texforce_hub.pipelines.decoder import with_decoder
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.pipelines.pin import pin_base
from texforce_hub.rewards.reward import Reward, resolve_rewards
from texforce_hub.train.algorithms.direct import require_gradients
from texforce_hub.train.config import TrainConfig, differing, make_config, unsaid
from texforce_hub.train.judge import Judge
from texforce_hub.train.learner import Learner
from texforce_hub.train.lora import load_lora, read_scales
from texforce_hub.train.memory import fit_batch
from texforce_hub.train.policies.choose import make_policy
from texforce_hub.train.policies.frozen import frozen
from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.policies.steps import grade_steps
from texforce_hub.train.run_folder import RunFolder, Trackers
from texforce_hub.train.team import ALONE, Team, joined
from texforce_hub.train.training_run import StepReport, TrainingRun, mix_seed

_SHEET_PROMPTS = 8


def train_adapter(
    config: TrainConfig, *, pipeline: Pipeline | None = None, on_step: Callable[[StepReport], None] | None = None
) -> Adapter:
    """Train a LoRA on the CLIP text encoders of a pipeline and write it to ``config.output``.

    If the folder holds a run with the same settings, it goes on from its newest checkpoint and ends, on the
    CPU with the same number of threads, with the same bits as a run that was never stopped. Whatever stops
    it – an exception, Ctrl-C – the state after the last whole step is saved before the exception goes on.

    ``pipeline`` is used as it is instead of loading ``config.base``; it is not changed. ``on_step`` is called
    after every step.

    Raises:
        ConfigError: the folder holds a run with other settings.
        PromptError, RewardError: prompts or a reward cannot be found, or prompts are too long to be read.
        NotBetterError: no step had anything to learn from, or none was better than the base on the held-out
            prompts; no adapter is written.
        TrainingError: another process trains there, or the run cannot go on; the message says why.

    Example:
        >>> from texforce_hub import TrainConfig, train_adapter
        >>> config = TrainConfig(base="shapes", reward=("alignment",), output="run", steps=80)
        >>> train_adapter(config)  # doctest: +SKIP
    """
    check_kind(config, TrainConfig, "give TrainConfig(output=...)")
    # A reward may draw from torch's own random numbers: the caller's state of them is put back.
    with joined() as team, no_denormals(), torch.random.fork_rng(devices=[]), ExitStack() as stack:
        with team.together():
            folder = stack.enter_context(own_folder(config.output)) if team.leads else Path(config.output)
            run = make_run(config, pipeline, RunFolder(folder), team)
        with frozen(run.policy.pipeline, checkpointing=config.checkpointing, tiling=config.tiling):
            with team.together():
                _start(run)
            _train(run, on_step or (lambda _: None))
        _refuse_nothing_learned(run)
        return run.adapter()


def _refuse_nothing_learned(run: TrainingRun) -> None:
    config, learner = run.config, run.learner
    if learner.succeeded:
        return
    if learner.step == 0:
        raise NotBetterError("the time was up before the first step was taken; no adapter is written")
    if not learner.taught:
        names, state = ", ".join(config.reward), f"the state is in checkpoint-{learner.step}"
        if config.algorithm == "direct":
            raise NotBetterError(
                f"no step of {learner.step} had anything to learn from: the gradient of {names} was 0 in every "
                f"picture, so no adapter is written; take another reward, or --algorithm streaming; {state}"
            )
        raise NotBetterError(
            f"no step of {learner.step} had anything to learn from: {names} gave every prompt's pictures the same, so "
            f"no adapter is written; take another reward, more images_per_prompt, or a lower guidance; {state}"
        )
    first, best = learner.validations[0][1], max(score for _, score in learner.validations[1:])
    raise NotBetterError(
        f"no step beat the {'adapter it began with' if config.init else 'base'} on the held-out prompts "
        f"({best:.3f} at best, {first:.3f} before), so no adapter is written; take more steps or another "
        f'learning rate, or give keep = "last"; the last weights are in checkpoint-{learner.step}'
    )


def make_run(config: TrainConfig, pipeline: Any, folder: RunFolder, team: Team = ALONE) -> TrainingRun:
    """Load what a run needs.

    Raises:
        ConfigError, PromptError, RewardError, TrainingError: as :func:`train_adapter`.
    """
    if team.size > config.prompts_per_step:
        raise ConfigError(
            f"{team.size} processes for prompts_per_step = {config.prompts_per_step}; expected at least a prompt for "
            f"each: set it to {team.size} or more, or start fewer"
        )
    prompts = load_prompts(config.prompts, base=config.base, canonical=config.canonical, anchors=config.anchor_prompts)
    if pipeline is None:
        device = team.device if config.device in (None, "cuda") and team.device else config.device
        pipeline = load_pipeline(config.base, unet=config.unet, device=device, dtype=config.dtype)
        config = replace(config, base=pin_base(config.base))
    if config.decoder is not None:
        pipeline = with_decoder(pipeline, config.decoder)
    policy, parameters = make_policy(pipeline, config, seed=mix_seed(config.seed, 0, 3))
    if not config.allow_cut:
        _refuse_cut(pipeline, [*prompts.texts(), config.negative_prompt])
    rewards, watch = (resolve_rewards(names, policy.device) for names in (config.reward, config.watch))
    _check_signal(policy, rewards)
    if both := {reward.name for reward in rewards} & {reward.name for reward in watch}:
        raise ConfigError(f"watch = {min(both)!r}, which is trained on, too; watch a reward that is not")
    if config.init is not None:
        load_lora(parameters, read_scales(policy.encoders), read_adapter(config.init))
    learner = Learner(parameters, config, team)
    judge, watcher = Judge(rewards, config, team), Judge(watch, config, team)
    samples = list(read_prompts(config.samples)) if config.samples else prompts.sample(_SHEET_PROMPTS)
    trackers = Trackers(config if team.leads else replace(config, track=()))
    run = TrainingRun(config, policy, learner, prompts, judge, watcher, folder, trackers, samples, team)
    set_batch_size(run, min(team.gather(config.batch_size or fit_batch(policy))))
    return run


def _check_signal(policy: Policy, rewards: Sequence[Reward]) -> None:
    """Refuse a run that has nothing to learn from, before its first picture."""
    config = policy.config
    if config.algorithm == "direct":
        require_gradients(rewards)
    else:
        grade_steps(policy.make_steps(config.inference_steps), config.share)


def set_batch_size(run: TrainingRun, size: int) -> None:
    """So many pictures in a U-Net call from now on."""
    run.policy = replace(run.policy, config=replace(run.config, batch_size=size))
    run.judge.config = run.watch.config = run.policy.config
    run.learner.batch_size = size


def _start(run: TrainingRun) -> None:
    state = run.team.lead(lambda: read_checkpoint(run.folder.path))
    if state is None:
        if run.team.leads:
            run.folder.write_config(run.config)
            run.folder.trim_metrics(0)
        if run.config.validate_every:
            run.say("validation before training: %.3f", run.validate(), level=logging.INFO)
    else:
        _go_on(run, state)
    run.look_at_clock()


def _go_on(run: TrainingRun, state: State) -> None:
    changed = differing(run.config, _read_config(state, run.config))
    if changed:
        was = ", ".join(f"{name} was {state.facts['config'].get(name)!r}" for name in changed)
        raise ConfigError(f"{run.folder.path} holds a run with other settings ({was}); use them, or another --output")
    if absent := run.learner.list_absent(state):
        raise _earlier_version(run.config, f"its state has no {absent[0]!r}")
    for name, now in {"threads": torch.get_num_threads(), "processes": run.team.size}.items():
        if (before := state.facts[name]) != now:
            run.say("the checkpoint was made with %d %s, not %d: the last bits may differ", before, name, now)
    run.learner.restore(state)
    set_batch_size(run, run.learner.batch_size)
    if run.team.leads:
        run.folder.trim_metrics(state.step)
        if run.due(run.config.sheet_every) and not run.folder.has_sheet(state.step):
            run.draw()  # it was killed between the checkpoint and the sheet
    run.say("resuming from step %d", state.step, level=logging.INFO)
    if state.step > run.config.steps:
        run.say("the run has taken %d steps already, more than %d; it stays as it is", state.step, run.config.steps)


def _read_config(state: State, config: TrainConfig) -> TrainConfig:
    try:
        settings = state.facts["config"]
        was = make_config({**settings, "output": config.output})
    except KeyError:
        raise _earlier_version(config, "its state has no settings") from None
    except ConfigError as error:
        raise _earlier_version(config, str(error)) from error
    if absent := unsaid(settings):  # today's default need not be what was done
        raise _earlier_version(config, f"its settings have no {absent[0]!r}")
    return was


def _earlier_version(config: TrainConfig, reason: str) -> ConfigError:
    return ConfigError(
        f"{config.output} holds a run of an earlier version ({reason}), which cannot go on; give another --output"
    )


def _train(run: TrainingRun, on_step: Callable[[StepReport], None]) -> None:
    saved = run.learner.snapshot()
    try:
        with run.trackers:
            while not run.finished:
                try:
                    with run.team.together():
                        report = run.take_step()
                except torch.OutOfMemoryError:
                    run.learner.restore(saved)
                    _take_smaller_slices(run)
                    continue
                saved = run.learner.snapshot()
                if run.team.leads:
                    _record(run, report, saved)
                    on_step(report)
    except BaseException as error:
        run.learner.restore(saved)
        if run.team.leads:
            with _undisturbed():
                run.save(saved)
        _explain(error, saved.step)
        raise
    if run.config.validate_every and run.learner.validations[-1][0] < run.learner.step:  # the time was up
        with run.team.together():
            run.validate()
        saved = run.learner.snapshot()
    with run.team.together():
        run.choose_multiple()
    if run.team.leads:
        run.save(saved)
        run.draw()


def _record(run: TrainingRun, report: StepReport, state: State) -> None:
    run.folder.append_metrics(report.flat())
    run.trackers.log(report.flat())
    if run.due(run.config.checkpoint_every):
        run.save(state)
    if run.due(run.config.sheet_every):
        run.draw()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until this is done: a launcher ends all processes as soon as one is lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _take_smaller_slices(run: TrainingRun) -> None:
    """Half as many pictures in a U-Net call; the result is the same but for rounding."""
    size = run.policy.config.batch_size
    if size == 1:
        raise TrainingError("out of memory with one picture at a time; give --preset 8gb, or a smaller resolution")
    run.say("out of memory with %d pictures in a U-Net call; going on with %d", size, size // 2)
    set_batch_size(run, size // 2)
    torch.cuda.empty_cache()


def _explain(error: BaseException, step: int) -> None:
    """Raise what went wrong in the step after ``step`` as one line, if it is something that can be helped."""
    if isinstance(error, ConfigError | RewardError | TrainingError):
        raise TrainingError(f"step {step + 1}: {error}; the state before it is in checkpoint-{step}") from error


def _refuse_cut(pipeline: Any, texts: list[str]) -> None:
    for prompt, limit, cut in find_cut(pipeline, [Emphasis(((text, 1.0),)) for text in texts if text]):
        raise PromptError(
            f"{prompt.text!r} is longer than the text encoder's {limit} tokens: {cut!r} would not be read, "
            "while the reward is asked about all of it; shorten it, or give --allow-cut"
        )
