"""Ten kills at moments uniform in a run's wall time, checkpoint writing included; all end with the same bits."""

import random

import pytest

from tests.train.test_run import bits, finish_child, kill_after, run, start_child
from texforce_hub.files.checkpoint import list_checkpoints

pytestmark = pytest.mark.campaign
KILLS = 10
ALGORITHMS = ("streaming", "ppo", "direct")
STEPS = 12


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """By algorithm, the folder of a run that was never stopped, and how long it took."""
    runs = {}
    for algorithm in ALGORITHMS:
        folder = tmp_path_factory.mktemp(f"uninterrupted-{algorithm}")
        runs[algorithm] = folder, finish_child(folder, steps=STEPS, algorithm=algorithm)
    return runs


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_uninterrupted_runs_have_the_same_bits(uninterrupted, tmp_path, algorithm):
    finish_child(tmp_path, steps=STEPS, algorithm=algorithm)  # else the rounds below would say nothing about killing
    assert bits(tmp_path) == bits(uninterrupted[algorithm][0])


def test_another_seed_has_other_bits(uninterrupted, tmp_path):
    run(tmp_path, steps=STEPS, seed=1)
    assert bits(tmp_path) != bits(uninterrupted["streaming"][0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(uninterrupted, tmp_path, number, algorithm):
    folder, seconds = uninterrupted[algorithm]
    rng = random.Random(number)
    for attempt in range(10):
        output = tmp_path / str(attempt)
        moment = rng.uniform(0, seconds)
        if kill_after(output, moment, steps=STEPS, algorithm=algorithm):  # one that had ended is no kill: draw again
            break
    else:
        pytest.fail("every kill came too late")
    checkpoints = [p.name for p in list_checkpoints(output)]
    parts = [p.name for p in output.rglob("*.part")]
    print(f"killed after {moment:.2f} of {seconds:.2f} s (attempt {attempt + 1}): {checkpoints}, half-written {parts}")  # noqa: T201
    finish_child(output, steps=STEPS, algorithm=algorithm)
    assert bits(output) == bits(folder)
    assert not list(output.rglob("*.part"))


@pytest.mark.parametrize("step", [1, 6])
def test_a_run_killed_inside_a_checkpoint_ends_with_the_same_bits(uninterrupted, tmp_path, step):
    child = start_child(tmp_path, steps=STEPS, die_at=step)
    assert child.wait(timeout=600) == -9
    assert f"checkpoint-{step}" not in [p.name for p in list_checkpoints(tmp_path)]
    assert list(tmp_path.glob(f".checkpoint-{step}.*.part"))  # it did die half-way
    finish_child(tmp_path, steps=STEPS)
    assert bits(tmp_path) == bits(uninterrupted["streaming"][0])
    assert not list(tmp_path.rglob("*.part"))
