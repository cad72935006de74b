"""What a run costs, said before it is started."""

import json
import re
import sys

import pytest
import torch
from typer.testing import CliRunner

from tests.support.training import make_policy, short_config, tiny_pipeline
from tests.train.test_gradient import PROMPTS, judge_of
from texforce_hub.cli import app
from texforce_hub.train.algorithms.direct import direct
from texforce_hub.train.algorithms.ppo import ppo
from texforce_hub.train.algorithms.streaming import streaming
from texforce_hub.train.config import PRESETS, make_config
from texforce_hub.train.estimate import count_units, estimate
from texforce_hub.train.policies.stable_diffusion import StableDiffusion


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        (streaming, {}), (streaming, {"uncond": "full"}), (streaming, {"guidance": 1.0}), (ppo, {}),
        (ppo, {"train_timesteps": 1, "passes": 2}), (direct, {"direct": "draft_lv"}),
        (direct, {"direct": "truncated", "direct_steps": 2}),
    ],
)  # fmt: skip
def test_the_units_are_those_that_are_spent(algorithm, changes, monkeypatch):
    policy, _ = make_policy(algorithm=algorithm.__name__, **changes)
    forwards = backwards = 0
    unet = StableDiffusion.call_network

    def count(self, latents, timesteps, text):
        nonlocal forwards, backwards
        forwards += len(latents)
        backwards += len(latents) * text.leaves[0].requires_grad
        return unet(self, latents, timesteps, text)

    monkeypatch.setattr(StableDiffusion, "call_network", count)
    for _ in algorithm(policy, PROMPTS, judge_of(policy), torch.Generator().manual_seed(0)):
        pass
    assert (forwards, backwards) == count_units(policy.config, 2)


def test_an_estimate_trains_nothing_and_names_the_steps():
    cost = estimate(short_config("unused"), pipeline=tiny_pipeline())
    assert [step.timestep for step in cost.steps] == [751, 501, 251, 1]
    assert [step.graded for step in cost.steps] == [True, True, False, False]
    assert sum(step.share for step in cost.steps) == pytest.approx(1)
    assert cost.tflop > 0
    weights = [p for part in ("unet", "vae", "text_encoder") for p in getattr(tiny_pipeline(), part).parameters()]
    assert cost.weights_gib == pytest.approx(4 * sum(p.numel() for p in weights) / 2**30)
    assert 0 < cost.gib < 1
    assert cost.seconds > 0


def test_the_command_prints_the_table_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text("prompts_per_step = 1\nimages_per_prompt = 2\ninference_steps = 4\n")
    result = CliRunner().invoke(app, ["train", "--dry-run", "--config", "tiny.toml", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert [step["graded"] for step in printed["steps"]] == [True, True, False, False]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]
    result = CliRunner().invoke(app, ["train", "--dry-run", "--config", "tiny.toml", "--preset", "8gb"])
    assert result.exit_code == 0, result.output
    assert re.search(r"memory: \S+ GiB of weights, and \S+ GiB that a U-Net call of 2 pictures keeps", result.stdout)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_made_of_settings_that_exist(name):
    config = make_config({"output": "x", **PRESETS[name]})
    assert config.dtype == "bfloat16"


def test_of_several_processes_one_prints_what_a_run_costs_and_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "tiny.toml").write_text("prompts_per_step = 1\nimages_per_prompt = 2\ninference_steps = 4\n")
    printed = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        result = CliRunner().invoke(app, ["train", "--dry-run", "--config", "tiny.toml", "--json"])
        assert result.exit_code == 0, result.output
        printed.append(result.output.count('"units"'))
    assert printed == [1, 0]
    result = CliRunner().invoke(app, ["train", "--preset", "9gb"])
    assert (result.exit_code, result.output) == (2, "")


def test_a_dry_run_reads_rewards_from_the_current_folder_as_the_run_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    (tmp_path / "my_own_reward.py").write_text("def dark(images, prompts):\n    return -images.mean((1, 2, 3))\n")
    (tmp_path / "tiny.toml").write_text("prompts_per_step = 1\nimages_per_prompt = 2\ninference_steps = 4\n")
    arguments = ["train", "--dry-run", "--config", "tiny.toml", "--reward", "python:my_own_reward:dark"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["train", "--dry-run", "--reward", "env:./my_own_reward.py:dark"])
    assert "does not say what it needs" in str(result.exception)
