"""Runs that were stopped, killed or damaged go on with the same bits; other settings and processes are refused."""

import json
import os
import shutil
import signal
import time
from contextlib import nullcontext

import pytest
import torch

from tests.support.kills import ends_with, in_child
from tests.support.training import Stopped, bits, run, saved, short_config
from texforce_hub.errors import ConfigError, FileError, TrainingError
from texforce_hub.files.checkpoint import State, list_checkpoints, write_checkpoint
from texforce_hub.train.learner import Learner
from texforce_hub.train.training_run import TrainingRun


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


def test_a_run_that_has_gone_further_than_asked_says_so_and_stays_as_it_is(whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    run(tmp_path / "run", steps=1, on_step=lambda report: pytest.fail("a step was taken"))
    assert "has taken 3 steps already, more than 1" in caplog.text
    assert bits(tmp_path / "run") == bits(whole)


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


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "sha256"])
def test_a_flipped_bit_in_the_newest_checkpoint_is_noticed_and_the_one_before_taken(whole, tmp_path, caplog, name):
    shutil.copytree(whole, tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "checkpoint-3" / name)
    steps = []
    run(tmp_path / "run", on_step=lambda report: steps.append(report.step))
    assert steps == [3]
    assert "checkpoint-3 (its bytes are not those that were written); passed over" in caplog.text
    assert bits(tmp_path / "run") == bits(whole)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_not_begun_anew(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for number in (2, 3):
        flip_a_bit(tmp_path / "run" / f"checkpoint-{number}" / "state.safetensors")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(
        FileError, match=r"no checkpoint is whole \(checkpoint-2, checkpoint-3\); delete them"
    ) as caught:
        run(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


def test_a_run_of_an_earlier_version_without_hashes_is_refused_in_one_line_that_says_so(whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    for path in list_checkpoints(tmp_path / "run"):
        (path / "sha256").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(FileError, match=r"run of an earlier version \(checkpoint-3 has no sha256\).*another --output"):
        run(tmp_path / "run")
    assert "cannot read" not in caplog.text
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("absent", ["text_encoder.", "processes", "config"])
def test_a_state_of_an_earlier_version_is_refused_in_one_line_that_says_so(whole, tmp_path, absent):
    state = saved(whole)
    tensors = {name.replace(f"/{absent}", "/"): tensor for name, tensor in state.tensors.items()}
    facts = {name: fact for name, fact in state.facts.items() if name != absent}
    write_checkpoint(tmp_path, State(state.step, tensors, facts), keep=2)
    with pytest.raises(ConfigError, match=r"run of an earlier version \(.*\), which cannot go on") as caught:
        run(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("absent", ["antithetic", "stretch"])
def test_a_state_that_does_not_say_a_setting_is_refused_and_not_taken_to_have_had_todays_default(
    whole, tmp_path, absent
):
    state = saved(whole)
    settings = {name: value for name, value in state.facts["config"].items() if name != absent}
    write_checkpoint(tmp_path, State(state.step, state.tensors, state.facts | {"config": settings}), keep=2)
    with pytest.raises(ConfigError, match=rf"earlier version \(its settings have no '{absent}'\), which cannot go on"):
        run(tmp_path, antithetic=True, stretch=1.0)


def test_a_state_without_settings_that_change_no_result_goes_on(whole, tmp_path):
    state = saved(whole)
    settings = {name: value for name, value in state.facts["config"].items() if name not in ("offload", "track")}
    settings["batch"] = settings.pop("batch_size")  # as it was called
    write_checkpoint(tmp_path, State(state.step, state.tensors, state.facts | {"config": settings}), keep=2)
    run(tmp_path)
    assert bits(tmp_path) == bits(whole)


@pytest.mark.parametrize("reason", [KeyboardInterrupt, Stopped, None])
def test_a_run_leaves_no_lock_however_it_ends(tmp_path, reason):
    def stop(report):
        assert (tmp_path / "run.pid").read_text() == f"{os.getpid()}\n"
        if reason:
            raise reason

    with pytest.raises(reason) if reason else nullcontext():
        run(tmp_path, steps=1, validate_every=0, on_step=stop)
    assert not {path.name for path in tmp_path.iterdir()} & {"run.pid", ".lock"}


def test_a_refused_run_leaves_the_lock_of_the_one_that_goes_on(tmp_path):
    def second(report):
        with pytest.raises(TrainingError, match="is training"):
            run(tmp_path)
        assert {"run.pid", ".lock"} <= {path.name for path in tmp_path.iterdir()}

    run(tmp_path, steps=1, validate_every=0, on_step=second)


def test_a_signal_while_the_state_is_saved_waits_until_it_is(tmp_path, monkeypatch):
    save = TrainingRun.save

    def save_disturbed(self, state):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        save(self, state)

    def stop(report):
        monkeypatch.setattr(TrainingRun, "save", save_disturbed)
        raise Stopped

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, validate_every=0, checkpoint_every=50, on_step=stop)
    assert saved(tmp_path).step == 1
    assert signal.getsignal(signal.SIGINT) is handler
