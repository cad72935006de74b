"""What pictures are worth: rewards, and how much better than its group each picture is."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread

import torch
from torch import Tensor

from texforce_hub.rewards.reward import Reward, score_images
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.team import ALONE, Team

_ROUNDING = 1e-5  # a group whose rewards differ by less than this share of their size does not differ


@dataclass
class Judge:
    """The rewards of a run; it sees a rollout's pictures one slice after the other, and remembers their scores.

    Shapes:
        scores: ``(rewards, b)``, of the rollout last closed, pictures grouped prompt by prompt; those of all
        processes, of which ``own`` are this one's
    """

    rewards: Sequence[Reward]
    config: TrainConfig
    team: Team = ALONE
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    own: slice = field(default_factory=lambda: slice(0))
    _seen: list[Callable[[], Tensor]] = field(default_factory=list)

    def begin(self) -> None:
        """A new rollout: nothing has been seen yet."""
        self._seen.clear()

    def see(self, images: Tensor, texts: Sequence[str]) -> None:
        """Have some more pictures of a rollout scored; rewards elsewhere answer while the next are drawn.

        With ``offload`` the pictures wait, so that rewards need the device only once all are drawn.

        Raises:
            RewardError: a reward cannot be used; the message names the prompt. It may come from :meth:`close` instead.
        """
        rows = [self._ask(reward, images, texts) for reward in self.rewards]
        self._seen.append(lambda: torch.stack([row() for row in rows]))

    def _ask(self, reward: Reward, images: Tensor, texts: Sequence[str]) -> Callable[[], Tensor]:
        """What gives a reward's scores ``(b,)``: known already, on their way, or computed when they are asked for."""
        if reward.remote:
            answer = Future[Tensor]()

            def ask() -> None:
                try:
                    answer.set_result(self.score(images, texts, [reward])[0])
                except BaseException as error:  # noqa: BLE001  # whoever waits for the answer gets it
                    answer.set_exception(error)

            Thread(target=ask, daemon=True).start()
            return answer.result
        if self.config.offload:
            waiting, device = images.cpu(), images.device
            return lambda: self.score(waiting.to(device), texts, [reward])[0]
        scores = self.score(images, texts, [reward])[0]
        return lambda: scores

    def note(self, scores: Tensor) -> None:
        """Remember scores ``(rewards, b)`` of some more pictures of a rollout."""
        self._seen.append(lambda: scores)

    def close(self) -> None:
        """The rollout is drawn, here and in the other processes: ``scores`` are its pictures'.

        Raises:
            RewardError: a reward cannot be used; the message names the prompt.
        """
        self.scores, self.own = self.collect(torch.cat([answer() for answer in self._seen], 1))
        self._seen.clear()

    def collect(self, scores: Tensor) -> tuple[Tensor, slice]:
        """Scores ``(rewards, b)`` of all processes' pictures, and which of them are this one's."""
        self._move(self.rewards, "cpu")
        parts = self.team.gather(scores.cpu())
        first = sum(part.shape[1] for part in parts[: self.team.rank])
        return torch.cat(parts, 1).to(scores.device), slice(first, first + scores.shape[1])

    def advantages(self) -> Tensor:
        """Close the rollout; the advantages ``(b,)`` of this process's pictures.

        Raises:
            RewardError: as :meth:`close`.
        """
        self.close()
        return self.compare(self.scores)[self.own]

    def score(self, images: Tensor, texts: Sequence[str], rewards: Sequence[Reward] | None = None) -> Tensor:
        """Every reward of some pictures, or those of ``rewards``, ``(rewards, b)``.

        Raises:
            RewardError: a reward cannot be used; the message names the prompt.
        """
        rewards = rewards or self.rewards
        self._move(rewards, images.device)
        return score_images(rewards, images, texts, batch=self.config.batch_size)

    def compare(self, scores: Tensor, *, images: int | None = None, only: int | None = None) -> Tensor:
        """The advantages ``(b,)`` of scores ``(rewards, b)``, in groups of ``images``; by one reward ``only``."""
        config, groups = self.config, scores.view(len(scores), -1, images or self.config.images_per_prompt)
        weights = [reward.weight if only in (None, i) else 0.0 for i, reward in enumerate(self.rewards)]
        floor, clip = config.advantage_floor, config.advantage_clip
        return group_advantages(groups, weights, floor=floor, clip=clip, one_out=config.leave_one_out).flatten()

    def total(self, scores: Tensor) -> Tensor:
        """The weighted sum of the rewards, ``(b,)``."""
        return torch.stack([r.weight * row for r, row in zip(self.rewards, scores, strict=True)]).sum(0)

    def ascend(self, images: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The gradient of the weighted sum at the images, of their shape, and the scores ``(rewards, b)``."""
        self._move(self.rewards, images.device)
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            rows = torch.stack([reward(leaf, texts) for reward in self.rewards])
            (gradient,) = torch.autograd.grad(self.total(rows).sum(), leaf)
        return gradient, rows.detach()

    def _move(self, rewards: Sequence[Reward], device: torch.device | str) -> None:
        for reward in rewards if self.config.offload else ():
            reward.move(device)

    @property
    def flat_groups(self) -> int:
        """Prompts whose pictures all got the same: they taught nothing."""
        groups = self.total(self.scores).view(-1, self.config.images_per_prompt)
        return int(_flat(groups).sum())


def group_advantages(
    rewards: Tensor, weights: Sequence[float], *, floor: float, clip: float, one_out: bool = False
) -> Tensor:
    """How much better than its group a picture is: rewards on any scale count as their weights say.

    Each reward is standardised in the group, the results are summed by weight, and the sum is divided by its own
    deviation plus ``floor``, which damps groups whose rewards contradict each other. ``one_out`` compares with the
    mean of the others in the group instead of that of all.

    Shapes:
        rewards: ``(rewards, prompts, images)``; the result is ``(prompts, images)``, in [-clip, clip]. A group of
        equal rewards gives exactly 0.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    standard = torch.where(_flat(rewards), 0.0, centred / rewards.std(-1, keepdim=True))
    share = torch.tensor(weights, device=rewards.device).view(-1, 1, 1) / sum(map(abs, weights))
    mixture = (share * standard).sum(0)
    if one_out:
        mixture = mixture * rewards.shape[-1] / (rewards.shape[-1] - 1)
    deviation = mixture.std(-1, keepdim=True) + floor
    return (mixture / deviation.clamp(min=1e-12)).clamp(-clip, clip)


def _flat(groups: Tensor) -> Tensor:
    """Whether a group's rewards ``(…, images)`` are equal up to rounding, ``(…, 1)``."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    return high - low <= _ROUNDING * groups.abs().amax(-1, keepdim=True)
