"""Whether a search still gains anything, by paired intervals over its prompts."""

from collections.abc import Sequence

import numpy as np

from texforce_hub.evaluate.statistics import Interval, bootstrap_mean

PATIENCE = 4
"""So many rounds in a row without a gain that can be told apart from chance end a search."""


class Progress:
    """How a search's weights do, round by round, on the prompts that it searches on.

    A round counts as a gain where one of its rows of scores, paired with that of the last gain prompt by prompt, has a
    95 % interval of the difference above 0; slow gains add up, because the last gain stays what is compared with. So
    many looks find gains by chance more often than 5 times in 100: they decide when to stop, and what the weights are
    worth is measured on other prompts.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self._patience, self._rounds = patience, 0
        self._first: np.ndarray | None = None
        self._best = np.zeros(0)

    def note(self, centre: np.ndarray, candidates: Sequence[np.ndarray] = ()) -> Interval:
        """Take a round's scores: the gain of the weights it began with over the start.

        Args:
            centre: of the weights that the round began with, ``(prompts,)``; in the first round the start's.
            candidates: of what it tried besides, ``(prompts,)`` each.
        """
        if self._first is None:
            self._first = self._best = centre
        highest = max((centre, *candidates), key=lambda scores: float(scores.mean()))
        if bootstrap_mean(highest - self._best).low > 0:
            self._best, self._rounds = highest, 0
        else:
            self._rounds += 1
        return bootstrap_mean(centre - self._first)

    @property
    def is_over(self) -> bool:
        """Whether so many rounds as there is patience for have gained nothing."""
        return self._rounds >= self._patience
