"""Which weights are kept, when a run ends, and what is said if nothing got better."""

import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from tests.support.training import run, saved, scripted_reward
from texforce_hub.cli import app
from texforce_hub.errors import NotBetterError
from texforce_hub.train.run_folder import ADAPTER


def test_the_best_weights_among_the_steps_are_kept_and_remembered(tmp_path, monkeypatch):
    reward = scripted_reward(monkeypatch, [0.5, 0, 0.6, 0, 0.9, 0, 0.7])  # a validation, then a rollout each
    adapter = run(tmp_path, keep="best", validate_every=1, reward=reward)
    assert [round(score, 1) for _, score in saved(tmp_path).facts["validations"]] == [0.5, 0.6, 0.9, 0.7]
    assert adapter.metadata["texforce_hub.steps"] == "2"


def test_a_run_that_beats_nothing_says_so_and_writes_no_adapter(tmp_path, monkeypatch):
    reward = scripted_reward(monkeypatch, [0.5, 0, 0.1, 0, 0.2, 0, 0.3])
    with pytest.raises(NotBetterError, match=r"no step beat the base .*0\.30. at best, 0\.50. before.*checkpoint-3"):
        run(tmp_path, keep="best", validate_every=1, reward=reward)
    assert not (tmp_path / ADAPTER).exists()
    assert saved(tmp_path).step == 3


def test_a_run_that_beats_nothing_leaves_the_command_line_with_1(tmp_path, monkeypatch):
    reward = scripted_reward(monkeypatch, [0.5, 0, 0.1])
    (tmp_path / "run.toml").write_text("prompts_per_step = 1\nimages_per_prompt = 2\ninference_steps = 2\n")
    arguments = ["--config", str(tmp_path / "run.toml"), "--reward", reward[0], "--steps", "1"]
    result = CliRunner().invoke(app, ["train", "--output", str(tmp_path / "run"), *arguments])
    assert result.exit_code == 1
    assert "no step beat the base" in result.output
    assert not (tmp_path / "run" / ADAPTER).exists()
    (tmp_path / "last.toml").write_text(
        'images_per_prompt = 2\ninference_steps = 2\nkeep = "last"\nvalidate_every = 0\n'
    )
    flat = ["--config", str(tmp_path / "last.toml"), "--reward", *constant_reward(monkeypatch), "--steps", "1"]
    result = CliRunner().invoke(app, ["train", "--output", str(tmp_path / "flat"), *flat])
    assert result.exit_code == 1
    assert "anything to learn from" in result.output
    assert not list((tmp_path / "flat").glob("*.safetensors"))


def test_a_reward_without_any_gradient_is_said_to_have_none(tmp_path, monkeypatch):
    module = types.ModuleType("level")

    def score(images, prompts):
        return 0 * images.mean((1, 2, 3))

    score.differentiable = True
    monkeypatch.setattr(module, "score", score, raising=False)
    monkeypatch.setitem(sys.modules, "level", module)
    settings = {"algorithm": "direct", "reward": ("python:level:score",), "validate_every": 0}
    with pytest.raises(NotBetterError, match="the gradient of python:level:score was 0 in every picture"):
        run(tmp_path, steps=1, inference_steps=2, **settings)
    assert not (tmp_path / ADAPTER).exists()


def constant_reward(monkeypatch):
    """A reward that cannot tell pictures apart: every group is flat, no step has a gradient."""
    module = types.ModuleType("constant")
    monkeypatch.setattr(module, "score", lambda images, prompts: torch.ones(len(images)), raising=False)
    monkeypatch.setitem(sys.modules, "constant", module)
    return ("python:constant:score",)


@pytest.mark.parametrize(
    "changes", [{"algorithm": "ppo"}, {"keep": "best"}, {"init": "shapes-colour", "rank": 16}], ids=str
)
def test_a_run_without_any_gradient_says_so_and_writes_no_adapter(tmp_path, monkeypatch, changes):
    settings = {"validate_every": 0, "reward": constant_reward(monkeypatch), "inference_steps": 2, **changes}
    for steps in (1, 2):  # the second goes on with the first
        with pytest.raises(NotBetterError, match=rf"no step of {steps} had anything to learn from: python:constant"):
            run(tmp_path, steps=steps, **settings)
        assert not (tmp_path / ADAPTER).exists()
    assert saved(tmp_path).step == 2


def test_a_run_goes_on_to_learn_after_steps_without_a_gradient(tmp_path, monkeypatch):
    calls = []

    def score(images, prompts):
        calls.append(len(images))
        return images.mean((1, 2, 3)) * (len(calls) > 1)

    monkeypatch.setattr(sys.modules[__name__], "late", score, raising=False)
    steps = []
    adapter = run(
        tmp_path, steps=2, inference_steps=2, validate_every=0, reward=(f"python:{__name__}:late",),
        on_step=lambda report: steps.append((report.flat_groups, (tmp_path / ADAPTER).exists())),
    )  # fmt: skip
    assert steps[0] == (2, False)
    assert steps[-1] == (0, True)
    assert any(adapter.delta(name).any() for name in adapter.layers)


def test_a_reward_that_is_only_watched_raises_the_alarm_when_it_falls(tmp_path, monkeypatch, caplog):
    reward = scripted_reward(monkeypatch, [0.5, 0, 0.6, 0, 0.7, 0, 0.8])
    other = types.ModuleType("watched")
    values = iter([1.0, 0.9, 0.2, 0.1])
    monkeypatch.setattr(other, "score", lambda i, p: next(values) + i.mean((1, 2, 3)) * 1e-6, raising=False)
    monkeypatch.setitem(sys.modules, "watched", other)
    settings = {"keep": "best", "validate_every": 1, "reward": reward, "watch": ("python:watched:score",)}
    run(tmp_path, **settings, validation_prompts=4)
    assert "reward hacking suspected" in caplog.text
    assert [round(score, 1) for _, score in saved(tmp_path).facts["watched"]] == [1.0, 0.9, 0.2, 0.1]


def test_the_best_multiple_of_the_kept_weights_goes_into_the_file(tmp_path, monkeypatch):
    values = [0.5, 0, 0.9, 0, 0.7]  # step 1 is the best of two
    settings = {"steps": 2, "keep": "best", "validate_every": 1}
    plain = run(tmp_path / "plain", reward=scripted_reward(monkeypatch, values), **settings)
    reward = scripted_reward(monkeypatch, [*values, 0.95, 0.6])
    adapter = run(tmp_path / "stretched", reward=reward, stretch=1.4, **settings)
    assert adapter.metadata["texforce_hub.multiple"] == "1.2"
    assert adapter.metadata["texforce_hub.steps"] == "1"
    for name in plain.layers:
        torch.testing.assert_close(adapter.delta(name), 1.2 * plain.delta(name))
    reward = scripted_reward(monkeypatch, [0.8, 0.8])  # again: nothing but the multiples is tried
    assert "texforce_hub.multiple" not in run(tmp_path / "stretched", reward=reward, stretch=1.4, **settings).metadata
    state, longer = saved(tmp_path / "plain"), saved(tmp_path / "stretched")
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in longer.tensors.items())


def test_what_an_adapter_of_init_had_is_not_stretched(tmp_path, monkeypatch):
    settings = {"steps": 1, "keep": "last", "validate_every": 1, "init": str(tmp_path / "init" / ADAPTER)}
    first = run(tmp_path / "init", steps=1, validate_every=0)
    plain = run(tmp_path / "plain", reward=scripted_reward(monkeypatch, [0.5, 0, 0.6]), **settings)
    reward = scripted_reward(monkeypatch, [0.5, 0, 0.6, 0.7, 0.8])
    adapter = run(tmp_path / "stretched", reward=reward, stretch=1.4, **settings)
    assert adapter.metadata["texforce_hub.multiple"] == "1.4"
    for name, layer in adapter.layers.items():
        began, ended = first.layers[name].up, plain.layers[name].up
        torch.testing.assert_close(layer.up, began + 1.4 * (ended - began))
        assert torch.equal(layer.down, plain.layers[name].down)


def test_a_multiple_at_which_the_watched_reward_falls_is_not_taken(tmp_path, monkeypatch):
    reward = scripted_reward(monkeypatch, [0.5, 0, 0.6, 0.7, 0.8])
    other = types.ModuleType("watched")
    values = iter([1.0, 1.0, 1.0, 0.1])
    monkeypatch.setattr(other, "score", lambda i, p: next(values) + i.mean((1, 2, 3)) * 1e-6, raising=False)
    monkeypatch.setitem(sys.modules, "watched", other)
    settings = {"steps": 1, "validate_every": 1, "reward": reward, "watch": ("python:watched:score",)}
    adapter = run(tmp_path, **settings, validation_prompts=4, stretch=1.4)
    assert adapter.metadata["texforce_hub.multiple"] == "1.2"


def test_a_run_ends_early_when_nothing_gets_better(tmp_path, monkeypatch):
    reward = scripted_reward(monkeypatch, [0.1, 0, 0.9, 0, 0.2, 0, 0.3])
    steps = []
    settings = {"keep": "best", "validate_every": 1, "reward": reward, "patience": 2}
    adapter = run(tmp_path, steps=50, on_step=lambda report: steps.append(report.step), **settings)
    assert steps == [1, 2, 3]
    assert adapter.metadata["texforce_hub.steps"] == "1"


def test_a_run_whose_time_was_up_before_its_first_step_writes_no_adapter(tmp_path):
    with pytest.raises(NotBetterError, match="before the first step"):
        run(tmp_path, max_minutes=1e-9, keep="best", validate_every=1)
    assert not list(tmp_path.glob("*.safetensors"))
