"""Intervals hold as often as they say, and tests agree with SciPy's."""

import math

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from texforce_hub.evaluate.diversity import shrink, spread
from texforce_hub.evaluate.statistics import bootstrap_mean, holm, resolvable, sign_flip, wilson, win_rate


def test_a_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(500):
        found = bootstrap_mean(rng.normal(0.1, 0.3, 96), resamples=1000)
        covered += found.low <= 0.1 <= found.high
    assert 0.93 <= covered / 500 <= 0.97


@pytest.mark.parametrize(("wins", "trials"), [(0, 5), (1, 7), (48, 96), (96, 96), (3, 200)])
def test_wilsons_interval_is_scipys(wins, trials):
    found = wilson(wins, trials)
    there = stats.binomtest(wins, trials).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((there.low, there.high), abs=1e-6)


def test_ties_count_half_of_a_win():
    assert win_rate(np.array([1.0, 0.0, -1.0, 0.0])).mean == 0.5
    assert win_rate(np.zeros(8)).mean == 0.5


@pytest.mark.parametrize("n", [3, 8, 12, 40])
def test_flipping_signs_gives_scipys_p(n):
    differences = np.random.default_rng(n).normal(0.2, 0.5, n)
    there = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, random_state=0
    )
    assert sign_flip(differences) == pytest.approx(there.pvalue, abs=1e-9 if n <= 12 else 0.012)


def test_a_stack_compared_with_itself_differs_by_nothing():
    same = np.zeros(96)
    assert sign_flip(same) == 1.0
    assert (bootstrap_mean(same).low, bootstrap_mean(same).high) == (0.0, 0.0)
    assert not bootstrap_mean(same).excludes_zero


def test_p_is_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(2)
    found = [sign_flip(rng.normal(0, 1, 24), flips=1000) for _ in range(300)]
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_holms_correction_is_the_published_one():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.5}) == {"a": 1.0, "b": 1.0}
    assert list(holm({"z": 0.5, "a": 0.1})) == ["z", "a"]


def test_what_a_sample_resolves_is_found_in_four_of_five_experiments():
    rng = np.random.default_rng(3)
    true = resolvable(rng.normal(0, 0.3, 100_000)) * math.sqrt(100_000 / 96)
    found = [stats.ttest_1samp(rng.normal(true, 0.3, 96), 0).pvalue < 0.05 for _ in range(600)]
    assert 0.75 <= np.mean(found) <= 0.85
    assert resolvable(np.array([0.5])) == math.inf


def test_diversity_is_the_mean_distance_of_pairs_and_grain_does_not_count():
    black, white = Image.new("RGB", (128, 64)), Image.new("RGB", (128, 64), "white")
    small = [shrink(picture) for picture in (black, black, white)]
    assert small[0].shape == (32, 64, 3)
    assert spread(small) == pytest.approx(2 / 3)
    assert spread(small[:2]) == spread(small[:1]) == 0.0
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.choice([0, 255], (512, 512, 3)).astype(np.uint8)) for _ in range(2)]
    assert spread([np.asarray(picture, np.float32) / 255 for picture in noise]) == pytest.approx(0.707, abs=0.01)
    assert spread([shrink(picture) for picture in noise]) < 0.1
