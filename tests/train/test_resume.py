"""Runs that were stopped, killed or damaged go on with the same bits; other settings and processes are refused."""

import json
import os
import signal
import time

import pytest
import torch

from tests.support.kills import ends_with, in_child
from tests.support.training import Stopped, bits, run, saved, short_config
from texforce_hub.errors import ConfigError, TrainingError
from texforce_hub.files.checkpoint import list_checkpoints, write_checkpoint
from texforce_hub.train.learner import Learner


@pytest.mark.parametrize("algorithm", ["ppo", "direct"])
def test_a_stopped_run_of_every_algorithm_goes_on_with_the_same_bits(tmp_path, algorithm):
    def interrupt(report):
        raise Stopped

    settings = {"algorithm": algorithm, "updates": 2, "steps": 2, "validate_every": 0}
    run(tmp_path / "whole", **settings)
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", **settings, on_step=interrupt)
    run(tmp_path / "stopped", **settings)
    assert bits(tmp_path / "stopped") == bits(tmp_path / "whole")
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(m["grad_norm"] > 0 for m in metrics)


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("reason", [Stopped, KeyboardInterrupt])
def test_a_stopped_run_goes_on_with_the_same_bits(whole, tmp_path, stop, reason):
    def interrupt(report):
        if report.step == stop:
            raise reason

    with pytest.raises(reason):
        run(tmp_path, on_step=interrupt, checkpoint_every=50)
    assert saved(tmp_path).step == stop
    torch.manual_seed(time.time_ns() % 1000)  # whatever else the process did
    steps = []
    run(tmp_path, on_step=lambda report: steps.append(report.step), checkpoint_every=50)
    assert steps == list(range(stop + 1, 4))
    assert bits(tmp_path) == bits(whole)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_finished_run_is_not_run_again(whole):
    before = bits(whole)
    run(whole, on_step=lambda report: pytest.fail("a step was taken"))
    assert bits(whole) == before


def test_other_settings_in_the_same_folder_are_refused(whole):
    with pytest.raises(ConfigError, match="rank was 4"):
        run(whole, rank=8)


def test_two_runs_in_one_folder_are_one_too_many(tmp_path):
    def second(report):
        with pytest.raises(TrainingError, match=f"process {os.getpid()} is training"):
            run(tmp_path)

    run(tmp_path, steps=1, on_step=second)


def test_a_killed_run_draws_the_sheet_that_it_owes(tmp_path):
    run(tmp_path, sheet_every=2, steps=2)
    (tmp_path / "samples" / "step-2.png").unlink()
    (tmp_path / "lines.txt").write_text("a red circle\n")
    run(tmp_path, sheet_every=2, steps=3, samples=str(tmp_path / "lines.txt"))
    assert (tmp_path / "samples" / "step-2.png").is_file()


def test_an_unreadable_checkpoint_is_passed_over(tmp_path, caplog):
    config = short_config(tmp_path)
    learner = Learner({"a": torch.nn.Parameter(torch.ones(2))}, config)
    for _ in range(3):
        learner.finish_step()
        write_checkpoint(tmp_path, learner.snapshot(), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    (tmp_path / "checkpoint-3" / "state.safetensors").write_bytes(b"torn")
    assert saved(tmp_path).step == 2
    assert "checkpoint-3" in caplog.text


def test_a_damaged_newest_checkpoint_is_replaced(tmp_path):
    run(tmp_path, checkpoint_every=2, steps=4)
    (tmp_path / "checkpoint-4" / "state.safetensors").write_bytes(b"torn")
    counts = []
    for _ in range(2):
        steps = []
        run(tmp_path, checkpoint_every=2, steps=4, on_step=lambda report: steps.append(report.step))  # noqa: B023
        counts.append(steps)
    assert counts == [[3, 4], []]
    assert not list(tmp_path.rglob("*.part"))


def test_a_killed_run_goes_on_with_the_same_bits(whole, tmp_path):
    child = in_child(lambda: run(tmp_path))
    end = time.monotonic() + 120
    while not list_checkpoints(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert ends_with(child) in (-signal.SIGKILL, 0)
    resumed = []
    run(tmp_path, on_step=lambda report: resumed.append(report.step))
    assert resumed in ([2, 3], [3], [])
    assert bits(tmp_path) == bits(whole)
