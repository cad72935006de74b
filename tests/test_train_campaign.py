"""Ten kills at moments uniform in a run's wall time, checkpoint writing included; all end with the same bits."""

import random
import time

import pytest

from tests.test_train_loop import bits, finish_child, kill_after

pytestmark = pytest.mark.campaign
KILLS = 10


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    began = time.monotonic()
    finish_child(folder)
    return folder, time.monotonic() - began


@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(uninterrupted, tmp_path, number):
    folder, seconds = uninterrupted
    kill_after(tmp_path, random.Random(number).uniform(0, seconds))
    finish_child(tmp_path)
    assert bits(tmp_path) == bits(folder)
    assert not list(tmp_path.rglob("*.part"))
