"""Ten kills at moments uniform in a run's wall time, checkpoint writing included; all end with the same bits.

Processes are forked off this one, which has everything loaded: a kill costs what the run itself costs.
"""

import os
import random
import signal
import time

import pytest

from tests.support.kills import ends_with, in_child
from tests.support.training import bits, run
from texforce_hub.files import checkpoint
from texforce_hub.files.checkpoint import list_checkpoints

pytestmark = pytest.mark.campaign
KILLS = 10
ALGORITHMS = ("streaming", "ppo", "direct")
STEPS = 6


def start(folder, **changes):
    """A process that trains in ``folder``."""
    return in_child(lambda: run(folder, steps=STEPS, **changes))


def finish(folder, **changes):
    """Train in ``folder`` to the end, in a process of its own; returns how many seconds that took."""
    began = time.monotonic()
    assert ends_with(start(folder, **changes)) == 0
    return time.monotonic() - began


def kill_after(seconds, folder, **changes):
    """``kill -9`` a training process so long after it began; returns whether it was still running."""
    child = start(folder, **changes)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return ends_with(child) == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """By algorithm, the folder of a run that was never stopped, and how long it took."""
    runs = {}
    for algorithm in ALGORITHMS:
        folder = tmp_path_factory.mktemp(f"uninterrupted-{algorithm}")
        runs[algorithm] = folder, finish(folder, algorithm=algorithm)
    return runs


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_uninterrupted_runs_have_the_same_bits(uninterrupted, tmp_path, algorithm):
    finish(tmp_path, algorithm=algorithm)  # else the rounds below would say nothing about killing
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
        output, moment = tmp_path / str(attempt), rng.uniform(0, seconds)
        if kill_after(moment, output, algorithm=algorithm):  # one that had ended is no kill: draw again
            break
    else:
        pytest.fail("every kill came too late")
    checkpoints = [p.name for p in list_checkpoints(output)]
    parts = [p.name for p in output.rglob("*.part")]
    print(f"killed after {moment:.2f} of {seconds:.2f} s (attempt {attempt + 1}): {checkpoints}, half-written {parts}")  # noqa: T201
    finish(output, algorithm=algorithm)
    assert bits(output) == bits(folder)
    assert not list(output.rglob("*.part"))


@pytest.mark.parametrize("step", [1, 6])
def test_a_run_killed_inside_a_checkpoint_ends_with_the_same_bits(uninterrupted, tmp_path, step):
    write = checkpoint.write_tensors

    def write_and_die(path, tensors):
        write(path, tensors)
        if f"checkpoint-{step}." in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    def die():
        checkpoint.write_tensors = write_and_die  # type: ignore[assignment]
        run(tmp_path, steps=STEPS)

    assert ends_with(in_child(die)) == -signal.SIGKILL
    assert f"checkpoint-{step}" not in [p.name for p in list_checkpoints(tmp_path)]
    assert list(tmp_path.glob(f".checkpoint-{step}.*.part"))  # it did die half-way
    finish(tmp_path)
    assert bits(tmp_path) == bits(uninterrupted["streaming"][0])
    assert not list(tmp_path.rglob("*.part"))
