"""What a run from start to finish writes and reports, and that it leaves everything else as it was."""

import json
import sys
import types
from typing import Any

import pytest
import torch

from tests.support.training import run, saved, scripted_reward, short_config, tiny_pipeline
from texforce_hub.errors import ConfigError, NotBetterError, TexForceHubError, TrainingError
from texforce_hub.files.checkpoint import list_checkpoints
from texforce_hub.files.tensors import read_tensors
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.settings import read_settings
from texforce_hub.train.config import make_config
from texforce_hub.train.run import train_adapter
from texforce_hub.train.run_folder import ADAPTER


def test_a_run_writes_everything_it_promises(whole):
    assert {p.name for p in whole.iterdir()} >= {
        ADAPTER,
        "config.toml",
        "metrics.jsonl",
        "reward.png",
        "signal.png",
        "samples",
    }
    assert [p.name for p in list_checkpoints(whole)] == ["checkpoint-2", "checkpoint-3"]
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert metrics[1]["validation"] is not None
    assert make_config(read_settings(whole / "config.toml")) == short_config(whole)
    header, tensors = read_tensors(whole / ADAPTER)
    assert len(tensors) == 2 * 3 * 4
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in tensors)
    assert header.metadata["texforce_hub.steps"] == "3"
    assert header.metadata["texforce_hub.uncond"] == "detach"
    assert str(whole) not in str(dict(header.metadata))


def test_the_file_does_in_a_plain_pipeline_what_the_trained_encoder_does(whole):
    from diffusers import StableDiffusionPipeline

    from texforce_hub.train.lora import attach_lora

    pipe = tiny_pipeline()
    state = saved(whole)
    encoders, parameters = attach_lora({"text_encoder": pipe.text_encoder}, short_config(whole), seed=0)
    encoder = encoders["text_encoder"]
    for name, parameter in parameters.items():
        parameter.data.copy_(state.tensors[f"average/{name}"])
    ids = pipe.tokenizer("a lime disc", padding="max_length", return_tensors="pt").input_ids
    plain = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    with torch.no_grad():
        base = plain.text_encoder(ids)[0]
        plain.load_lora_weights(str(whole))
        try:
            torch.testing.assert_close(plain.text_encoder(ids)[0], encoder(ids)[0], rtol=1e-5, atol=1e-6)
        finally:
            plain.unload_lora_weights()
        assert not torch.equal(encoder(ids)[0], base)


def test_the_pipeline_is_left_as_it_was(tmp_path):
    pipe = tiny_pipeline()
    pipe.unet.requires_grad_(True)
    before = {
        n: t.clone() for part in ("text_encoder", "unet", "vae") for n, t in getattr(pipe, part).state_dict().items()
    }
    run(tmp_path, steps=1)
    after = {n: t for part in ("text_encoder", "unet", "vae") for n, t in getattr(pipe, part).state_dict().items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(p.requires_grad for p in pipe.unet.parameters())


@pytest.mark.parametrize("bad", ["nan", "raise"])
def test_a_bad_reward_stops_with_prompt_and_step_and_loses_nothing(tmp_path, monkeypatch, bad):
    module = types.ModuleType("failing_rewards")
    calls = []

    def score(images, prompts):
        calls.append(prompts)
        if len(calls) < 2:
            return images.mean((1, 2, 3))
        if bad == "raise":
            raise RuntimeError("out of order")
        return torch.full((len(prompts),), torch.nan)

    monkeypatch.setattr(module, "score", score, raising=False)
    monkeypatch.setitem(sys.modules, "failing_rewards", module)
    with pytest.raises(TrainingError, match=r"step 2: reward .* for the prompt '.+'.*checkpoint-1"):
        run(tmp_path, reward=("python:failing_rewards:score",), validate_every=0, checkpoint_every=50)
    assert saved(tmp_path).step == 1


def test_a_run_ends_when_its_time_is_up_and_goes_on_later(tmp_path):
    steps = []
    with pytest.raises(NotBetterError, match="the time was up before the first step"):
        run(tmp_path, max_minutes=1e-9, on_step=lambda report: steps.append(report.step))
    assert (steps, (tmp_path / ADAPTER).exists()) == ([], False)
    run(tmp_path, max_minutes=60.0, on_step=lambda report: steps.append(report.step))
    assert steps == [1, 2, 3]


def test_training_on_brightness_makes_the_shapes_pipeline_draw_brighter(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    settings: dict[str, Any] = {"steps": 6, "images_per_prompt": 8, "inference_steps": 6, "learning_rate": 3e-3}
    settings |= {
        "guidance": 5.0,
        "anchor": 0.0,
        "warmup": 0,
        "decay": "constant",
        "rank": 16,
        "alpha": 16.0,
        "ema": 0.0,
    }
    settings |= {"validate_every": 6, "validation_images": 8, "validation_steps": 6}
    config = short_config(tmp_path / "run", prompts=str(tmp_path / "prompts.txt"), **settings)
    train_adapter(config, pipeline=load_pipeline("shapes", device="cpu"))
    before, after = saved(tmp_path / "run").facts["validations"]
    assert after[1] > before[1] + 0.015


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tensorboard", "'tensorboard', which is not installed: pip install tensorboard$"),
        ("mlflow", "'mlflow'; expected one of tensorboard, wandb, trackio$"),
    ],
)
def test_a_tracker_that_is_not_there_is_named(tmp_path, name, says, monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "is_tensorboard_available", lambda: False)
    with pytest.raises(ConfigError, match=f"track = {says}"):
        run(tmp_path, track=(name,))


def test_a_tracker_gets_every_steps_numbers(tmp_path, monkeypatch):
    from accelerate import tracking

    lines = []

    class Tracker:
        requires_logging_directory = True

        def __init__(self, name, logging_dir):
            lines.append(logging_dir)

        def start(self):
            lines.append("start")

        def log(self, values, step):
            lines.append((step, values["reward"], values["reward/brightness"]))

        def finish(self):
            lines.append("finish")

    monkeypatch.setattr(tracking, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    run(tmp_path, track=("tensorboard",), steps=2)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [(m["step"], m["reward"], m["rewards"]["brightness"]) for m in metrics]
    assert lines == [str(tmp_path), "start", *steps, "finish"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"samples": "none.txt"}, "none.txt"),
        ({"track": ("mlflow",)}, "track = 'mlflow'"),
        ({"algorithm": "direct"}, "has no gradient"),
        ({"eta": 1e-12}, "none of the 4 denoising steps has noise"),
        ({"watch": ("nothing",)}, "no reward 'nothing'"),
        ({"inference_steps": 1001}, "1001 denoising steps; the base was trained on 1000"),
        ({"init": "nowhere/at-all"}, "nowhere/at-all"),
        ({"anchor_prompts": "none.txt"}, "none.txt"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_picture_and_leaves_nothing(tmp_path, monkeypatch, changes, says):
    monkeypatch.chdir(tmp_path)
    reward = scripted_reward(monkeypatch, [])  # it has no answer to any picture
    with pytest.raises(TexForceHubError, match=says) as caught:
        run(tmp_path / "run", reward=reward, **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_is_trained_on_cannot_be_the_one_that_is_watched(tmp_path):
    with pytest.raises(ConfigError, match="watch = 'brightness', which is trained on, too"):
        run(tmp_path / "run", reward=("brightness=0.5",), watch=("brightness",))
    assert not (tmp_path / "run").exists()
