"""Several processes train one adapter: forked off this one, they meet over gloo as under a launcher."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState

from tests.support.kills import ends_with, in_child
from tests.support.training import Stopped, run, saved
from texforce_hub.files.checkpoint import list_checkpoints
from texforce_hub.hub.read import read_adapter
from texforce_hub.train.run_folder import ADAPTER
from texforce_hub.train.team import Team

ROOT = Path(__file__).parents[2]
SETTINGS = {"prompts_per_step": 3, "steps": 2, "validation_prompts": 2, "batch_size": 4, "inference_steps": 3}


def train(folder, **changes):
    return run(folder, **{**SETTINGS, **changes})


def start(size, work):
    """Processes that each do ``work(rank)``, with what a launcher tells them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def join(rank):
        PartialState._reset_state()  # this process was alone
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work(rank)

    return [in_child(lambda rank=rank: join(rank)) for rank in range(size)]


def finish(size, folder, **changes):
    """Train to the end in so many processes; the hashes of what each of them holds then."""

    def work(rank):
        adapter = train(folder, **changes)
        numbers = b"".join(layer.up.numpy().tobytes() for _, layer in sorted(adapter.layers.items()))
        (folder / f"hash-{rank}").write_text(hashlib.sha256(numbers).hexdigest())

    assert [ends_with(child) for child in start(size, work)] == [0] * size
    return {(folder / f"hash-{rank}").read_text() for rank in range(size)}


def fail(size, folder, work):
    """Have processes do what cannot end well; what each of them says, by rank."""

    def note(rank):
        try:
            work(rank)
        except Exception as error:  # noqa: BLE001
            (folder / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")

    codes = [ends_with(child) for child in start(size, note)]
    files = [folder / f"error-{rank}" for rank in range(size)]
    return codes, [path.read_text() if path.exists() else "" for path in files]


def learned(folder):
    """All that a run has learned: weights, running average, the optimiser's moments."""
    tensors = saved(folder).tensors
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if not name.endswith("/step")])


def assert_same(folder, other, most=1e-6):
    difference = (learned(folder) - learned(other)).norm() / learned(other).norm()
    assert difference < most
    pairs = zip(saved(folder).facts["validations"], saved(other).facts["validations"], strict=True)
    assert all(score == pytest.approx(expected, abs=1e-6) for (_, score), (_, expected) in pairs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder)
    return folder


@pytest.mark.parametrize("size", [2, 3])
def test_processes_together_learn_what_one_does_and_all_hold_the_same(alone, tmp_path, size):
    assert len(finish(size, tmp_path)) == 1
    assert_same(tmp_path, alone)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2  # one of them keeps the log
    assert (tmp_path / "samples" / "step-2.png").exists()


def test_processes_together_choose_the_multiple_that_one_does(tmp_path):
    settings = {"stretch": 1.4, "learning_rate": 0.02, "validate_every": 1}
    alone = train(tmp_path / "one", **settings)
    (tmp_path / "two").mkdir()
    assert len(finish(2, tmp_path / "two", **settings)) == 1
    together = read_adapter(str(tmp_path / "two"))
    assert together.metadata["texforce_hub.multiple"] == alone.metadata["texforce_hub.multiple"] == "1.4"


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "ppo", "updates": 2, "train_timesteps": 1},
        {"algorithm": "direct", "direct": "draft_lv"},
        {"reward": ("brightness", "jpeg"), "uncond": "full"},
    ],
)
def test_every_algorithm_learns_the_same_in_two_processes(tmp_path, changes):
    (tmp_path / "two").mkdir()
    train(tmp_path / "one", validate_every=0, **changes)
    assert len(finish(2, tmp_path / "two", validate_every=0, **changes)) == 1
    assert_same(tmp_path / "two", tmp_path / "one", most=1e-5)
    one, two = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    for line, other in zip(map(numbers_of, one), map(numbers_of, two), strict=True):
        assert other == pytest.approx(line, rel=1e-4, abs=1e-6)


def numbers_of(line):
    import json

    report = json.loads(line)
    return {name: value for name, value in report.items() if isinstance(value, int | float)} | report["rewards"]


def test_a_run_goes_on_in_another_number_of_processes(alone, tmp_path, caplog):
    def interrupt(report):
        raise Stopped

    _, errors = fail(2, tmp_path, lambda _: train(tmp_path, on_step=interrupt))
    assert [error.partition(":")[0] for error in errors] == ["Stopped", "TrainingError"]
    finish(3, tmp_path)
    assert_same(tmp_path, alone)
    train(tmp_path, steps=3)
    assert "was made with 3 processes, not 1" in caplog.text


def test_where_one_process_is_killed_the_others_end_and_the_state_is_saved(alone, tmp_path):
    def work(rank):
        def die(report):
            assert report.step == 1

        from texforce_hub.train.training_run import TrainingRun

        step = TrainingRun.take_step

        def step_or_die(self):
            if rank == 1 and self.learner.step == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self)

        TrainingRun.take_step = step_or_die
        train(tmp_path, checkpoint_every=50, on_step=die)

    codes, errors = fail(3, tmp_path, work)
    assert codes == [0, -signal.SIGKILL, 0]
    assert errors[0].startswith("TrainingError: step 2: another process of the run has ended")
    assert errors[0].endswith("the state before it is in checkpoint-1")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    finish(2, tmp_path)
    assert_same(tmp_path, alone)


def test_a_reward_that_fails_in_one_process_is_named_by_the_first(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "def score(images, prompts):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise RuntimeError('out of order')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    reward = f"python:{tmp_path / 'mine.py'}:score"
    _, errors = fail(2, tmp_path, lambda _: train(tmp_path / "run", reward=(reward,), validate_every=0))
    assert "process 1: reward" in errors[0]
    assert "out of order" in errors[0]
    assert "the state before it is in checkpoint-0" in errors[0]
    assert "out of order" in errors[1]


def test_where_one_process_has_no_memory_all_take_smaller_slices(tmp_path):
    from texforce_hub.train.policies.stable_diffusion import StableDiffusion

    # Without pairs: what parts two pictures of one start is here so little that rounding shows in it.
    changes = {"validate_every": 0, "antithetic": False}
    train(tmp_path / "alone", **changes)
    predict = StableDiffusion.predict

    def predict_few(self, latents, timesteps, rows):
        if len(latents) > 2 and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("too many")
        return predict(self, latents, timesteps, rows)

    def work(rank):
        StableDiffusion.predict = predict_few
        train(tmp_path / "both", **changes)

    codes, errors = fail(2, tmp_path, work)
    assert (codes, errors) == ([0, 0], ["", ""])
    assert saved(tmp_path / "both").facts["batch_size"] == 2
    torch.testing.assert_close(learned(tmp_path / "both"), learned(tmp_path / "alone"), rtol=1e-2, atol=1e-4)


def test_what_one_process_refuses_all_refuse(tmp_path):
    train(tmp_path, steps=1)
    for changes, says in (({"rank": 8}, "rank was 4"), ({"prompts_per_step": 1}, "2 processes for prompts_per_step")):
        _, errors = fail(2, tmp_path, lambda _: train(tmp_path, **changes))  # noqa: B023
        assert all(says in error and "\n" not in error for error in errors)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 11])
def test_shares_are_all_there_is_and_differ_by_one_at_most(size, count):
    parts = [range(count)[Team(rank, size).share(count)] for rank in range(size)]
    assert [index for part in parts for index in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        "torch.distributed.run --standalone --nproc-per-node 2",
        pytest.param(
            "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no",
            marks=pytest.mark.campaign,
        ),
    ],
)
def test_the_launchers_start_a_run_that_one_process_speaks_for(tmp_path, launcher):
    (tmp_path / "run.toml").write_text(
        'prompts_per_step = 2\nimages_per_prompt = 2\ninference_steps = 2\nvalidate_every = 0\nkeep = "last"\n'
    )
    arguments = f"-m texforce_hub train --config {tmp_path / 'run.toml'} --steps 1 --device cpu".split()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher.split(), *arguments, "--output", str(tmp_path / "run")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False, timeout=150
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("weights of step 1 of 1") == 1
    assert saved(tmp_path / "run").facts["processes"] == 2
    assert (tmp_path / "run" / ADAPTER).is_file()
