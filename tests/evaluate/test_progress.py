"""A search ends when its prompts can tell no further gain from chance."""

import numpy as np
import pytest

from texforce_hub.evaluate.progress import Progress

NOISE = np.random.default_rng(0).normal(size=24)


def rounds_until_over(means, patience=3):
    progress = Progress(patience)
    for number, scores in enumerate(means):
        gain = progress.note(scores)
        if progress.is_over:
            return number, gain
    return None, gain


def test_a_gain_that_every_round_shows_goes_on():
    assert rounds_until_over([NOISE + 0.1 * k for k in range(20)])[0] is None


def test_a_search_that_has_gained_ends_when_nothing_more_is_gained():
    last, gain = rounds_until_over([NOISE, NOISE + 1, *[NOISE + 1] * 10])
    assert last == 4
    assert (gain.low, gain.high) == (pytest.approx(1), pytest.approx(1))


def test_what_a_round_tried_besides_counts_as_a_gain():
    progress = Progress(1)
    progress.note(NOISE, [NOISE + 1])
    assert not progress.is_over
    progress.note(NOISE, [NOISE + 1])
    assert progress.is_over


def test_noise_without_a_gain_ends_a_search_soon():
    rng = np.random.default_rng(1)
    last, gain = rounds_until_over([rng.normal(size=24) for _ in range(20)])
    assert last is not None
    assert not gain.excludes_zero


def test_slow_gains_add_up():
    small = np.random.default_rng(2).normal(size=(9, 24)) * 0.3
    assert rounds_until_over([small[k] + 0.1 * k for k in range(9)], patience=4)[0] is None
