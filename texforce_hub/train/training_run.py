"""The machinery of a run: one step, one validation, one sheet; what a step is made of is the algorithm's affair."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any

import torch
from torch import Generator, Tensor

from texforce_hub.adapter.value import Adapter
from texforce_hub.files.checkpoint import State, write_checkpoint
from texforce_hub.generate.prompts.sets import PromptSet
from texforce_hub.hub.write import write_adapter
from texforce_hub.train.algorithms.algorithm import Algorithm
from texforce_hub.train.algorithms.direct import direct
from texforce_hub.train.algorithms.ppo import ppo
from texforce_hub.train.algorithms.streaming import streaming
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.judge import Judge
from texforce_hub.train.learner import Learner
from texforce_hub.train.lora import describe_run, read_lora, read_scales
from texforce_hub.train.policies.policy import Policy
from texforce_hub.train.policies.sample import sample_images
from texforce_hub.train.run_folder import ADAPTER, RunFolder, Trackers
from texforce_hub.train.team import ALONE, Team

ALGORITHMS: dict[str, Algorithm] = {"streaming": streaming, "ppo": ppo, "direct": direct}
_LOG = logging.getLogger("texforce_hub")


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
    policy: Policy
    learner: Learner
    prompts: PromptSet
    judge: Judge
    watch: Judge
    folder: RunFolder
    trackers: Trackers
    samples: list[str]  # prompts of the sheets
    team: Team = ALONE
    late: bool = False  # max_minutes are over
    multiple: float = 1.0  # of what the kept weights have learned, what goes into the file
    started: float = field(default_factory=monotonic)

    def take_step(self) -> StepReport:
        """One rollout, its rewards, and its updates.

        Raises:
            RewardError: a reward cannot be used; nothing was updated.
            TrainingError: the gradient is not finite.
        """
        config, learner, policy, judge = self.config, self.learner, self.policy, self.judge
        torch.manual_seed(mix_seed(config.seed, learner.step, 0))  # for a reward that draws random numbers
        texts = self.prompts.draw(learner.step, config.prompts_per_step, config.seed)
        own = texts[self.team.share(len(texts))]
        anchors = self.prompts.anchors(learner.step, config.anchor_count, config.seed)
        rate, updates, norms = learner.set_learning_rate(), [], []
        began, learning = monotonic(), 0.0
        judge.begin()
        for update in ALGORITHMS[config.algorithm](policy, own, judge, self._generator(1)):
            before = monotonic()
            norms.append(learner.learn(policy, policy.texts(own), update.cotangents, anchors))
            updates.append(update.facts)
            learning += monotonic() - before
        learner.finish_step()
        self.look_at_clock()
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
        scores, *watched = self._score_held_out(self.learner.average)
        self.learner.note_validation(scores.mean().item())
        if watched:
            self._watch(watched[0])
        elif _has_fallen(scores, self.learner.validations[0][1]):
            self.say("step %d: the held-out reward is below where it began", self.learner.step)
        return scores.mean().item()

    def choose_multiple(self) -> None:
        """Try what was learned, stretched, on the validation prompts; the best multiple goes into the file.

        What the anchor holds hardly moves when the weights are stretched, so that more is gained than lost. What an
        adapter of ``init`` had is not stretched. A multiple at which what is watched has fallen is not taken.
        """
        config, learner = self.config, self.learner
        step, weights = learner.kept
        before = dict(learner.validations).get(step)
        if config.stretch == 1 or before is None or not learner.succeeded:
            return
        best = before
        for multiple in ((1 + config.stretch) / 2, config.stretch):
            scores, *watched = self._score_held_out(learner.stretch(weights, multiple))
            fallen = watched and _has_fallen(watched[0], learner.watched[0][1])
            self.say(
                "validation at %g times what was learned: %.3f", multiple, scores.mean().item(), level=logging.INFO
            )
            if scores.mean().item() > best and not fallen:
                best, self.multiple = scores.mean().item(), multiple

    def _score_held_out(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """What the judge, and the watch if there is one, give the validation's pictures, drawn by all processes."""
        config, number = self.config, self.config.validation_images
        judges = [self.judge, self.watch] if self.watch.rewards else [self.judge]
        texts = self.prompts.sample(config.validation_prompts)
        share = self.team.share(len(texts))
        scores = [torch.empty(len(judge.rewards), 0) for judge in judges]
        if own := [text for text in texts[share] for _ in range(number)]:
            with self.learner.showing(weights):
                steps = config.picture_steps
                images = sample_images(self.policy, texts, images=number, steps=steps, seed=0, share=share)
            scores = [judge.score(images, own) for judge in judges]
        return [judge.total(judge.collect(rows)[0]) for judge, rows in zip(judges, scores, strict=True)]

    def _watch(self, scores: Tensor) -> None:
        """Remember what the rewards that are not trained on say; warn if they fall while the others rise."""
        learner = self.learner
        learner.watched.append((learner.step, scores.mean().item()))
        rose = learner.validations[-1][1] > learner.validations[0][1]
        if rose and _has_fallen(scores, learner.watched[0][1]):
            names = ", ".join(reward.name for reward in self.watch.rewards)
            pair = learner.watched[0][1], learner.watched[-1][1]
            self.say(
                "reward hacking suspected at step %d: held out, the reward rose, but %s fell, %.3f to %.3f",
                learner.step, names, *pair,
            )  # fmt: skip

    def say(self, text: str, *values: object, level: int = logging.WARNING) -> None:
        """Log it, once for all processes."""
        if self.team.leads:
            _LOG.log(level, text, *values)

    def adapter(self) -> Adapter:
        """The weights that the run has to show, as an adapter."""
        step, weights = self.learner.kept
        facts = self.prompts.facts | ({"multiple": f"{self.multiple:g}"} if self.multiple != 1 else {})
        stretched = self.learner.stretch(weights, self.multiple)
        return read_lora(stretched, read_scales(self.policy.encoders), describe_run(self.config, step, facts))

    def save(self, state: State) -> None:
        """Write a checkpoint, and the adapter as it is now if it is better than nothing."""
        write_checkpoint(self.folder.path, state, keep=self.config.checkpoints)
        if self.learner.succeeded:
            write_adapter(self.adapter(), self.folder.path / ADAPTER)

    def draw(self) -> None:
        """The sheet – the same prompts at the same noise, by the base and now – and the run's plots."""
        texts, step, steps = self.samples, self.learner.step, self.config.picture_steps
        with self.learner.showing(self.learner.average):
            policies = (self.policy.reference, self.policy)
            columns = [sample_images(policy, texts, images=1, steps=steps, seed=1) for policy in policies]
        self.folder.write_sheet(columns, texts, ["base", f"step {step}"], step=step)
        self.folder.write_curve(self.learner.validations)

    def look_at_clock(self) -> None:
        """Note whether the time is up; the first process's clock counts."""
        if (most := self.config.max_minutes) is not None:
            self.late = self.team.lead(lambda: (monotonic() - self.started) / 60 >= most)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, the time is up, or there has been no new best for long."""
        config, learner = self.config, self.learner
        waited = [step for step, _ in learner.validations if step > learner.best_step]
        return learner.step >= config.steps or self.late or bool(config.patience and len(waited) >= config.patience)

    def due(self, every: int) -> bool:
        """Whether the step just taken is one of every so many, or the last."""
        return bool(every) and (self.learner.step % every == 0 or self.finished)

    @torch.no_grad()
    def _shift(self, texts: list[str]) -> float:
        pairs = zip(self.policy.encode(texts), self.policy.reference.encode(texts), strict=True)
        return torch.cat([(now - before).flatten() for now, before in pairs]).square().mean().sqrt().item()

    def _generator(self, purpose: int) -> Generator:
        return Generator().manual_seed(mix_seed(self.config.seed, self.learner.step, purpose))


def _has_fallen(scores: Tensor, first: float) -> bool:
    """Whether a mean is below an earlier one by more than two standard errors."""
    return len(scores) > 1 and scores.mean().item() < first - 2 * scores.std().item() / len(scores) ** 0.5


def mix_seed(seed: int, step: int, purpose: int) -> int:
    """A seed for one purpose of one step."""
    return ((seed * 1_000_003 + step) * 8 + purpose) % 2**63
