"""Rewards in an environment of their own: made whole or not at all, asked for first, ended with the run, revived."""

import io
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from texforce_hub.cli.doctor.rewards import examine_rewards
from texforce_hub.cli.environments import prepare_rewards
from texforce_hub.errors import RewardError
from texforce_hub.hub.provenance import read_training
from texforce_hub.rewards.environment import build
from texforce_hub.rewards.environment.requirements import Requirements, read_requirements
from texforce_hub.rewards.environment.spec import EnvironmentRef
from texforce_hub.rewards.licences import describe_licences
from texforce_hub.rewards.reward import resolve_reward, resolve_rewards
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.lora import describe_run

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"prompt {i}" for i in range(5)]
BLOCK = """# /// script
# dependencies = ["numpy==2.3.0", "pillow==12.0.0"]
# [tool.texforce-hub]
# licence = "MIT"
# ///
"""
REWARD = """
import os, sys

def score(images, prompts):
    print("a word on stdout")
    assert type(images).__module__ == "numpy" and "torch" not in sys.modules
    return images.mean((1, 2, 3))

def pid(images, prompts):
    return [os.getpid()] * len(prompts)

def dies(images, prompts):
    if not os.path.exists("{flag}"):
        open("{flag}", "w").close()
        print("my last words", file=sys.stderr, flush=True)
        os._exit(7)
    return images.mean((1, 2, 3))

def always_dies(images, prompts):
    print("out of memory", file=sys.stderr, flush=True)
    os._exit(9)

def fails(images, prompts):
    if "prompt 3" in prompts:
        raise ValueError("no threes")
    return images.mean((1, 2, 3))

def nan(images, prompts):
    return [float("nan")] * len(prompts)
"""


@pytest.fixture
def reward_file(tmp_path, monkeypatch):
    """A reward's file whose environment is there: this one's interpreter under another name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "mine.py"
    path.write_text(BLOCK + REWARD.replace("{flag}", str(tmp_path / "flag")))
    python = build.find_python(build.environment_folder(read_requirements(path)))
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return path


def process_of(reward):
    return reward.function.workers[0]._processes[0]


def test_scores_are_the_functions_whatever_it_prints_and_without_torch(reward_file):
    reward = resolve_reward(f"env:{reward_file}:score=0.5")
    assert torch.allclose(reward(IMAGES, PROMPTS), IMAGES.mean((1, 2, 3)))
    assert (reward.name, reward.weight, reward.differentiable) == (f"env:{reward_file}:score", 0.5, False)


def test_two_workers_share_the_pictures_in_order(reward_file):
    reward = resolve_reward(f"env:{reward_file}:score:2")
    assert torch.allclose(reward(IMAGES, PROMPTS), IMAGES.mean((1, 2, 3)))
    pids = resolve_reward(f"env:{reward_file}:pid:2")(IMAGES, PROMPTS).tolist()
    assert pids[0] == pids[2] != pids[3] == pids[4]


def test_a_worker_that_was_killed_is_started_again(reward_file):
    reward = resolve_reward(f"env:{reward_file}:score")
    for _ in range(2):
        process_of(reward).kill()
        assert torch.allclose(reward(IMAGES, PROMPTS), IMAGES.mean((1, 2, 3)))
    assert reward.function.workers[0].starts == 3


def test_a_worker_that_dies_at_a_question_is_asked_again(reward_file):
    reward = resolve_reward(f"env:{reward_file}:dies")
    reward.function.wait = lambda seconds: None
    assert torch.allclose(reward(IMAGES, PROMPTS), IMAGES.mean((1, 2, 3)))


def test_a_worker_that_dies_at_every_question_is_named_with_its_last_words(reward_file):
    reward = resolve_reward(f"env:{reward_file}:always_dies")
    reward.function.wait, reward.function.attempts = (lambda seconds: None), 2
    with pytest.raises(RewardError, match=r"answered 2 times for the prompt 'prompt 0'.*status 9.*out of memory"):
        reward(IMAGES, PROMPTS)


def test_a_worker_that_hangs_is_ended_and_started_again(reward_file):
    reward = resolve_reward(f"env:{reward_file}:score")
    reward.function.wait, reward.function.timeout = (lambda seconds: None), 0.5
    stopped = process_of(reward)
    os.kill(stopped.pid, 19)  # SIGSTOP: it is there, and silent
    assert torch.allclose(reward(IMAGES, PROMPTS), IMAGES.mean((1, 2, 3)))
    assert stopped.poll() is not None


def test_a_function_that_fails_is_named_once_with_the_prompt(reward_file):
    with pytest.raises(RewardError, match=r"ValueError for the prompt 'prompt 3': no threes"):
        resolve_reward(f"env:{reward_file}:fails")(IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="gave nan for the prompt 'prompt 0'"):
        resolve_reward(f"env:{reward_file}:nan")(IMAGES, PROMPTS)


def test_a_function_that_is_not_there_is_refused_before_the_run(reward_file):
    with pytest.raises(RewardError, match="has no 'beauty'"):
        resolve_reward(f"env:{reward_file}:beauty")


@pytest.mark.parametrize("wanted", [20, pytest.param(200, marks=pytest.mark.campaign)])
def test_of_many_kills_at_any_moment_none_loses_or_hangs_a_score(wanted, reward_file):
    reward = resolve_reward(f"env:{reward_file}:score:2")
    remote = reward.function
    remote.wait, remote.attempts = (lambda seconds: None), 1000
    kills = 0
    while kills < wanted:
        for worker in remote.workers:
            for process in list(worker._processes):
                threading.Timer(0.002 * (kills % 5), process.kill).start()
                kills += 1
        assert torch.allclose(reward(IMAGES, PROMPTS), IMAGES.mean((1, 2, 3)))


def test_the_process_ends_with_its_reward_and_with_a_run_that_is_killed(reward_file):
    reward = resolve_reward(f"env:{reward_file}:score")
    process = process_of(reward)
    del reward
    assert process.wait(10) == 0
    code = (
        "import sys, os; from texforce_hub.rewards.reward import resolve_reward;"
        f"r = resolve_reward('env:{reward_file}:pid'); print(r.function.workers[0]._processes[0].pid, flush=True);"
        "os.kill(os.getpid(), 9)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert wait_until_gone(int(run.stdout))


def wait_until_gone(pid):
    for _ in range(500):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ("", "PEP 723"),
        ('# /// script\n# dependencies = ["numpy"]\n# ///\n', "names no one version"),
        ('# /// script\n# dependencies = ["numpy>=2"]\n# ///\n', "names no one version"),
        ('# /// script\n# dependencies = ["numpy==2.*"]\n# ///\n', "names no one version"),
        ('# /// script\n# dependencies = ["a @ https://x.org/a.whl"]\n# ///\n', "names no one version"),
        ('# /// script\n# dependencies = ["--hash"]\n# ///\n', "no requirement"),
        ('# /// script\n# dependencies = "numpy"\n# ///\n', "a list of texts"),
        ("# /// script\n# dependencies = [\n# ///\n", "TOML"),
        ('# /// script\n# requires-python = "<3"\n# ///\n', "needs Python <3"),
        ('# /// script\n# requires-python = "new"\n# ///\n', "requires-python 'new'"),
        ("# /// script\n# [tool.texforce-hub]\n# only = 1\n# ///\n", "only = 1"),
    ],
)
def test_requirements_that_cannot_be_had_are_one_line(tmp_path, block, says):
    path = tmp_path / "mine.py"
    path.write_text(block + "def score(images, prompts): ...\n")
    with pytest.raises(RewardError, match=says) as caught:
        read_requirements(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("env:hand", "did you mean 'env:hands'"),
        ("env:hands:0", "0 workers"),
        ("env:hands:100", "100 workers"),
        ("env:hands:x", "no reward"),
        ("env:./no.py:score", "there is no file"),
        ("env:./no.py", "expected env:"),
        ("env:", "no reward"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_in_one_line(spec, says):
    with pytest.raises(RewardError, match=says):
        EnvironmentRef.parse(spec)


def test_what_is_built_in_names_pinned_requirements_and_terms():
    for name in ("env:hands", "env:faces"):
        requirements = EnvironmentRef.parse(name).requirements()
        assert "mediapipe==0.10.14" in requirements.packages
        assert requirements.only_these
        assert (requirements.licence or "").startswith("Apache-2.0")


def test_an_environment_that_is_not_there_is_one_line_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RewardError, match="rewards check env:hands --yes"):
        resolve_rewards(["env:hands"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["rewards", "check", "env:hands"],
        ["evaluate", "--reward", "env:hands=2"],
        ["tune", "--adapter", "shapes-colour", "--adapter", "shapes-shape", "--reward", "env:hands"],
        ["train", "--reward", "alignment", "--watch", "env:faces", "--output", "run"],
        ["reward-server", "--reward", "env:hands:2"],
    ],
)
def test_every_command_says_what_it_would_install_and_refuses_without_a_yes(arguments, tmp_path, monkeypatch):
    from texforce_hub.cli import app

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(RewardError, match=r"mediapipe==0\.10\.14.*--yes installs it"):
        app(arguments, standalone_mode=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("answer", "yes", "asked"), [(True, False, 1), (False, False, 1), (False, True, 0)])
def test_at_a_terminal_there_is_a_question_and_yes_needs_none(answer, yes, asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    questions = []

    def confirm(text, **_):
        questions.append(text)
        return answer

    monkeypatch.setattr("typer.confirm", confirm)
    steps = Steps(monkeypatch)
    if answer or yes:
        prepare_rewards(["alignment", "env:hands=2", "env:faces"], yes=yes)
        assert steps.ran == ["venv", "pip"]  # both rewards need the same
    else:
        with pytest.raises(RewardError, match="was not installed"):
            prepare_rewards(["env:hands"], yes=yes)
        assert steps.ran == []
    assert len(questions) == asked
    assert "mediapipe==0.10.14" in capsys.readouterr().err


class Steps:
    """What ``venv`` and ``pip`` would do, without either."""

    def __init__(self, monkeypatch, fails=""):
        self.ran, self.fails = [], fails
        monkeypatch.setattr(build, "_run", self.run)

    def run(self, command, what):
        self.ran.append(what)
        if what == "venv":
            build.find_python(Path(command[-1])).parent.mkdir(parents=True)
            build.find_python(Path(command[-1])).write_text("")
        if what == self.fails:
            raise KeyboardInterrupt if what == "venv" else RewardError(f"{what} failed")


@pytest.mark.parametrize("fails", ["venv", "pip"])
def test_an_installation_that_fails_or_is_interrupted_leaves_nothing_behind(fails, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = Requirements(("tiny==1.0",))
    folder = build.environment_folder(wanted)
    Steps(monkeypatch, fails)
    with pytest.raises((RewardError, KeyboardInterrupt)):
        build.build_environment(wanted)
    assert [path.suffix for path in folder.parent.iterdir()] == [".lock"]
    steps = Steps(monkeypatch)
    assert build.build_environment(wanted) == build.build_environment(wanted) == folder
    assert steps.ran == ["venv", "pip"]  # the second time it was there
    assert (folder / "requirements.txt").read_text() == "tiny==1.0\n"


def test_of_two_that_make_the_same_environment_one_does_and_one_waits(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted, said, entered = Requirements(("tiny==1.0",)), [], threading.Event()
    steps = Steps(monkeypatch)

    def say(text):
        said.append(text)
        entered.set()

    def slow(command, what):
        if what == "venv":
            second.start()
            assert entered.wait(20)  # the other has come and been told to wait
        steps.run(command, what)

    monkeypatch.setattr(build, "_run", slow)
    second = threading.Thread(target=build.build_environment, args=(wanted, say))
    build.build_environment(wanted)
    second.join()
    assert steps.ran == ["venv", "pip"]
    assert ["waiting for it" in text for text in said] == [True]


@pytest.mark.slow
def test_pip_installs_what_is_pinned(tmp_path, monkeypatch):
    """A real environment, from a wheel made here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", "number = 7\n")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    folder = build.build_environment(Requirements(("tiny==1.0",)))
    python = str(build.find_python(folder))
    assert subprocess.check_output([python, "-I", "-c", "import tiny; print(tiny.number)"], text=True) == "7\n"


def test_what_pip_says_is_one_line():
    code = "import sys; print('WARNING: old', 'ERROR: no tiny==2.0', 'more', sep='\\n', file=sys.stderr); sys.exit(1)"
    with pytest.raises(RewardError, match=r"^pip could not make the environment: ERROR: no tiny==2\.0; nothing"):
        build._run([sys.executable, "-c", code], "pip")


def test_the_number_of_workers_is_no_part_of_a_rewards_name():
    ref = EnvironmentRef.parse("env:hands:3")
    assert (ref.name, ref.path.name, ref.workers) == ("env:hands", "hands.py", 3)


def test_the_licences_of_rewards_are_named_with_files_by_their_last_component(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(BLOCK + "def score(images, prompts): ...\n")
    said = describe_licences(
        ["pickscore:/models/x=2", "brightness", f"env:{path}:score=0.5", "env:hands:2", "http://h"]
    )
    hands = "env:hands: Apache-2.0 (MediaPipe and the models in its wheel)"
    assert said == f"pickscore: MIT; env:mine.py:score: MIT; {hands}"
    path.unlink()
    assert describe_licences([f"env:{path}:score"]) == ""


def test_a_run_writes_the_licences_into_its_adapter_and_the_card_shows_them():
    config = TrainConfig(reward=("clipscore", "alignment=0.5"), output="run")
    metadata = describe_run(config, 3)
    assert metadata["texforce_hub.reward_licenses"] == "clipscore: MIT"
    assert "texforce_hub.reward_licenses" not in describe_run(TrainConfig(reward=("alignment",), output="run"), 3)
    training = read_training(metadata, None)
    assert training is not None
    assert training.settings["reward licences"] == "clipscore: MIT"


def test_doctor_says_whether_the_environments_are_there(reward_file, monkeypatch):
    assert {finding.state for finding in examine_rewards()} == {"note"}
    monkeypatch.setattr(build, "environment_folder", lambda _: reward_file.parent)
    python = build.find_python(reward_file.parent)
    python.parent.mkdir()
    python.write_text("")
    assert [(finding.name, finding.state) for finding in examine_rewards()] == [
        ("reward env:hands", "ok"),
        ("reward env:faces", "ok"),
    ]
