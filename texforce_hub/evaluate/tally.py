"""Scores as they come, picture by picture in any order, until they are an evaluation."""

from collections.abc import Mapping, Sequence

import numpy as np

from texforce_hub.evaluate.diversity import spread
from texforce_hub.evaluate.drawing import Job
from texforce_hub.evaluate.evaluation import Evaluation, Sampling


class Tally:
    """The scores of some prompts under some variants, and how different each prompt's pictures are.

    Args:
        same: for every variant the one whose pictures it shares, itself for most.
        rewards: names, in the order in which scores are noted.
    """

    def __init__(
        self, same: Mapping[str, str], prompts: Sequence[str], rewards: Sequence[str], sampling: Sampling
    ) -> None:
        self._same, self._prompts, self._rewards, self._sampling = same, tuple(prompts), tuple(rewards), sampling
        self._column = {seed: number for number, seed in enumerate(sampling.seeds)}
        shape = (len(rewards), len(prompts), len(sampling.seeds))
        self._scores = {name: np.full(shape, np.nan) for name in dict.fromkeys(same.values())}
        self._spread = {name: np.full(len(prompts), np.nan) for name in self._scores}
        self._seen: dict[tuple[str, int], list[np.ndarray]] = {}

    def note(self, job: Job, scores: Sequence[float], small: np.ndarray) -> None:
        """One picture: its scores, one a reward, and itself as :func:`~texforce_hub.evaluate.diversity.shrink` has it.

        The small pictures of a prompt are forgotten when all its seeds are there.
        """
        self._scores[job.variant][:, job.index, self._column[job.seed]] = scores
        seen = self._seen.setdefault((job.variant, job.index), [])
        seen.append(small)
        if len(seen) == len(self._column):
            self._spread[job.variant][job.index] = spread(self._seen.pop((job.variant, job.index)))

    def evaluation(self) -> Evaluation:
        """All that was noted; each variant with the scores of the one whose pictures it shares."""
        scores = {
            reward: {name: self._scores[other][number] for name, other in self._same.items()}
            for number, reward in enumerate(self._rewards)
        }
        several = len(self._column) > 1
        diversity = {name: self._spread[other] for name, other in self._same.items()} if several else {}
        return Evaluation(self._prompts, self._sampling, scores, diversity)
