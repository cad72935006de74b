"""Runs from start to finish: what they write, how they stop, that they go on with the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.support.training import make_policy, short_config, tiny_pipeline
from texforce_hub.cli import app
from texforce_hub.errors import ConfigError, NotBetterError, PromptError, TrainingError
from texforce_hub.files.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint
from texforce_hub.files.tensors import read_tensors
from texforce_hub.generate.prompts.sets import load_prompts
from texforce_hub.hub.read import read_adapter
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.settings import read_settings, write_settings
from texforce_hub.train.config import TrainConfig, make_config
from texforce_hub.train.learner import Learner, learning_rate_share
from texforce_hub.train.run import train_adapter
from texforce_hub.train.run_folder import ADAPTER

ROOT = Path(__file__).parents[2]


def run(output, *, on_step=None, **changes):
    return train_adapter(short_config(output, **changes), pipeline=tiny_pipeline(), on_step=on_step)


def saved(folder):
    """The newest checkpoint, which has to be there."""
    state = read_checkpoint(Path(folder))
    assert state is not None
    return state


def bits(folder):
    return {name: tensor.numpy().tobytes() for name, tensor in read_tensors(Path(folder) / ADAPTER)[1].items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


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
    encoder, parameters = attach_lora(pipe.text_encoder, short_config(whole), seed=0)
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


class Stopped(Exception):
    pass


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


def test_two_runs_in_one_folder_are_one_too_many(tmp_path):
    def second(report):
        with pytest.raises(TrainingError, match=f"process {os.getpid()} is training"):
            run(tmp_path)

    run(tmp_path, steps=1, on_step=second)


def brighter_each_call(monkeypatch, values):
    """A reward for the test to script: the mean of every call's scores, apart from the pictures' own differences."""
    module, calls = types.ModuleType("scripted"), iter(values)

    def score(images, prompts):
        return next(calls) + images.mean((1, 2, 3)) * 1e-3

    monkeypatch.setattr(module, "score", score, raising=False)
    monkeypatch.setitem(sys.modules, "scripted", module)
    return ("python:scripted:score",)


def test_the_best_weights_among_the_steps_are_kept_and_remembered(tmp_path, monkeypatch):
    reward = brighter_each_call(monkeypatch, [0.5, 0, 0.6, 0, 0.9, 0, 0.7])  # a validation, then a rollout each
    adapter = run(tmp_path, keep="best", validate_every=1, reward=reward)
    assert [round(score, 1) for _, score in saved(tmp_path).facts["validations"]] == [0.5, 0.6, 0.9, 0.7]
    assert adapter.metadata["texforce_hub.steps"] == "2"


def test_a_run_that_beats_nothing_says_so_and_writes_no_adapter(tmp_path, monkeypatch):
    reward = brighter_each_call(monkeypatch, [0.5, 0, 0.1, 0, 0.2, 0, 0.3])
    with pytest.raises(NotBetterError, match=r"no step beat the base .*0\.30. at best, 0\.50. before.*checkpoint-3"):
        run(tmp_path, keep="best", validate_every=1, reward=reward)
    assert not (tmp_path / ADAPTER).exists()
    assert saved(tmp_path).step == 3


def test_a_run_that_beats_nothing_leaves_the_command_line_with_1(tmp_path, monkeypatch):
    reward = brighter_each_call(monkeypatch, [0.5, 0, 0.1])
    (tmp_path / "run.toml").write_text("prompts_per_step = 1\nimages_per_prompt = 2\ninference_steps = 2\n")
    arguments = ["--config", str(tmp_path / "run.toml"), "--reward", reward[0], "--steps", "1"]
    result = CliRunner().invoke(app, ["train", "--output", str(tmp_path / "run"), *arguments])
    assert result.exit_code == 1
    assert "no step beat the base" in result.output
    assert not (tmp_path / "run" / ADAPTER).exists()


def test_a_reward_that_is_only_watched_raises_the_alarm_when_it_falls(tmp_path, monkeypatch, caplog):
    reward = brighter_each_call(monkeypatch, [0.5, 0, 0.6, 0, 0.7, 0, 0.8])
    other = types.ModuleType("watched")
    values = iter([1.0, 0.9, 0.2, 0.1])
    monkeypatch.setattr(other, "score", lambda i, p: next(values) + i.mean((1, 2, 3)) * 1e-6, raising=False)
    monkeypatch.setitem(sys.modules, "watched", other)
    settings = {"keep": "best", "validate_every": 1, "reward": reward, "watch": ("python:watched:score",)}
    run(tmp_path, **settings, validation_prompts=4)
    assert "reward hacking suspected" in caplog.text
    assert [round(score, 1) for _, score in saved(tmp_path).facts["watched"]] == [1.0, 0.9, 0.2, 0.1]


def test_a_run_ends_early_when_nothing_gets_better(tmp_path, monkeypatch):
    reward = brighter_each_call(monkeypatch, [0.1, 0, 0.9, 0, 0.2, 0, 0.3])
    steps = []
    settings = {"keep": "best", "validate_every": 1, "reward": reward, "patience": 2}
    adapter = run(tmp_path, steps=50, on_step=lambda report: steps.append(report.step), **settings)
    assert steps == [1, 2, 3]
    assert adapter.metadata["texforce_hub.steps"] == "1"


def test_a_run_ends_when_its_time_is_up_and_goes_on_later(tmp_path):
    steps = []
    run(tmp_path, max_minutes=1e-9, on_step=lambda report: steps.append(report.step))
    assert steps == []
    run(tmp_path, max_minutes=60.0, on_step=lambda report: steps.append(report.step))
    assert steps == [1, 2, 3]


def test_a_run_whose_time_was_up_before_its_first_step_writes_no_adapter(tmp_path):
    with pytest.raises(NotBetterError, match="before the first step"):
        run(tmp_path, max_minutes=1e-9, keep="best", validate_every=1)
    assert not list(tmp_path.glob("*.safetensors"))


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


def test_a_learner_restores_what_it_saw():
    parameters = {"a": torch.nn.Parameter(torch.ones(2, 2))}
    learner = Learner(parameters, short_config("unused"))
    parameters["a"].grad = torch.ones(2, 2)
    learner.optimizer.step()
    learner.finish_step()
    learner.note_validation(0.5)
    state = learner.snapshot()
    parameters["a"].grad = -torch.ones(2, 2)
    learner.optimizer.step()
    learner.finish_step()
    learner.restore(state)
    again = learner.snapshot()
    assert (again.step, again.facts) == (state.step, state.facts)
    assert again.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(again.tensors[n], t) for n, t in state.tensors.items())


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


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_learning_rate_warms_up_and_decays_whatever_the_runs_length(decay):
    config = short_config("unused", steps=10, decay_steps=10, warmup=4, decay=decay)
    shares = [learning_rate_share(config, step) for step in range(20)]
    assert shares[0] == pytest.approx(0.25)
    assert all(0 < share <= 1 for share in shares)
    assert (shares[-1] == 1) == (decay == "constant")
    longer = short_config("unused", steps=20, decay_steps=10, warmup=4, decay=decay)
    assert [learning_rate_share(longer, step) for step in range(20)] == shares  # an extended run does not jump


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learning_rat": 1e-3}, "did you mean 'learning_rate'"),
        ({"steps": "many"}, "expected a whole number"),
        ({"steps": True}, "expected a whole number"),
        ({"anchor": -1.0}, "at least 0"),
        ({"kl": 0.1}, "no option 'kl' any more: the anchor"),
        ({"skip_last": 2}, "no option 'skip_last' any more: .*share"),
        ({"clip": 0.0}, "more than 0"),
        ({"clip": float("nan")}, "clip = nan; expected a finite number"),
        ({"learning_rate": float("inf")}, "learning_rate = inf; expected a finite number"),
        ({"max_minutes": float("inf")}, "max_minutes = inf; expected a finite number"),
        ({"guidance": 10**400}, "expected a finite number"),
        ({"uncond": "none"}, "'detach' or 'base' or 'full'"),
        ({"canonical": 1.5}, "from 0 to 1"),
        ({"updates": 200}, "only 16 pictures"),
        ({"algorithm": "grpo"}, "'streaming' or 'ppo' or 'direct'"),
        ({"reward": []}, "no reward"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(settings, says):
    with pytest.raises(ConfigError, match=says):
        make_config({"output": "x", **settings})


@pytest.mark.parametrize("number", ["1" + "0" * 400, "²"])
def test_a_pattern_with_an_impossible_number_is_refused(number):
    with pytest.raises(ConfigError, match="expected PATTERN=NUMBER"):
        make_policy(alpha_pattern=(f"layers.0={number}",))


def test_a_config_survives_toml(tmp_path):
    config = TrainConfig(output='a "b"\\c é', reward=("jpeg=-1", "brightness"), prompts="p.txt", anchor=0.1)
    (tmp_path / "run.toml").write_text(write_settings(asdict(config)), encoding="utf-8")
    assert make_config(read_settings(tmp_path / "run.toml")) == config


def test_a_config_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_settings(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path / "none.toml")


def test_shapes_prompts_are_seen_combinations_and_half_of_them_canonical_if_asked():
    from texforce_hub.shapes.grammar import NOISY_COLOURS, SPLITS, combination_class, parse

    prompts = load_prompts(None, base="shapes", canonical=0.5)
    drawn = [prompts.draw(step, 8, seed=0) for step in range(20)]
    assert drawn[3] == prompts.draw(3, 8, seed=0) != prompts.draw(3, 8, seed=1)
    for texts in drawn:
        assert len(set(texts)) == 8
        assert all(combination_class(parse(text)) in SPLITS["train"] for text in texts)
        assert sum(any(word in text.split() for word in NOISY_COLOURS.values()) for text in texts) == 4
    noisy = load_prompts(None, base="shapes", canonical=0.0)
    held_out = noisy.sample(32)
    assert sum(any(word in text.split() for word in NOISY_COLOURS.values()) for text in held_out) == 16
    assert not set(held_out) & {text for step in range(300) for text in noisy.draw(step, 4, seed=0)}
    assert not set(held_out) & {text for step in range(30) for text in noisy.anchors(step, 32, seed=0)}


def test_listed_prompts_come_all_before_any_comes_again(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n# no\ntwo\nthree\n")
    prompts = load_prompts(str(tmp_path / "p.txt"), base="anything", canonical=0.5)
    drawn = [text for step in range(3) for text in prompts.draw(step, 2, seed=0)]
    assert sorted(drawn[:3]) == sorted(drawn[3:]) == ["one", "three", "two"]
    assert len(prompts.sample(2)) == 2


def test_what_a_run_is_judged_by_it_is_never_trained_on(tmp_path):
    lines = [f"a photo of animal number {i}" for i in range(200)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    prompts = load_prompts(str(tmp_path / "p.txt"), base="anything", canonical=0.0)
    held_out = set(prompts.sample(1000))
    drawn = {text for step in range(100) for text in prompts.draw(step, 4, seed=0)}
    assert 10 <= len(held_out) <= 30
    assert drawn | held_out == set(lines)
    assert not drawn & held_out
    (tmp_path / "p.txt").write_text("\n".join(["another", *reversed(lines)]))  # a prompt keeps its side of the split
    assert held_out <= set(load_prompts(str(tmp_path / "p.txt"), base="x", canonical=0.0).sample(1000)) | {"another"}


def test_prompts_to_leave_alone_come_from_their_file(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    (tmp_path / "anchors.txt").write_text("a house\na tree\n")
    own, other = (
        load_prompts(str(tmp_path / "p.txt"), base="x", canonical=0.0, anchors=a)
        for a in (None, str(tmp_path / "anchors.txt"))
    )
    assert set(own.anchors(0, 32, 0)) == {"a cat", "a dog"}
    assert set(other.anchors(0, 32, 0)) == {"a house", "a tree"}


LONG = "a red circle " * 10


def test_a_prompt_that_would_be_cut_is_refused_unless_that_is_wanted(tmp_path):
    (tmp_path / "p.txt").write_text(f"a red circle\n{LONG}\n")
    with pytest.raises(PromptError, match=r"longer than the text encoder's 16 tokens: 'circle.*--allow-cut"):
        run(tmp_path / "run", prompts=str(tmp_path / "p.txt"))
    run(tmp_path / "run", prompts=str(tmp_path / "p.txt"), allow_cut=True, steps=1)


def test_a_run_goes_on_from_an_adapter(whole, tmp_path):
    start = read_adapter(whole / ADAPTER)
    began = run(tmp_path / "same", init=str(whole), steps=1, learning_rate=1e-12, weight_decay=0.0, rank=6)
    for name in start.layers:
        torch.testing.assert_close(began.delta(name), start.delta(name), rtol=1e-5, atol=1e-7)
    assert began.layers[next(iter(start.layers))].rank == 6  # a lower rank can grow
    with pytest.raises(TrainingError, match=r"rank 4 .*expected at most rank 2 .*--rank 4"):
        run(tmp_path / "small", init=str(whole), rank=2)
    with pytest.raises(TrainingError, match="is not trained here"):
        run(tmp_path / "other", init=str(whole), target="mlp")


def test_the_layers_that_are_trained_and_their_ranks_can_be_chosen(tmp_path):
    patterns = {"rank_pattern": ("layers.0.self_attn.q_proj=2",), "alpha_pattern": ("fc1=3",)}
    adapter = run(tmp_path, target="all", steps=1, **patterns)
    assert len(adapter.layers) == 3 * 6
    ranks = {name: layer.rank for name, layer in adapter.layers.items()}
    assert [name for name, rank in ranks.items() if rank == 2] == [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    ]
    with pytest.raises(ConfigError, match="expected PATTERN=NUMBER"):
        run(tmp_path / "bad", rank_pattern=("layers.0",))


def test_running_out_of_memory_takes_smaller_slices_and_says_so(whole, tmp_path, monkeypatch, caplog):
    from texforce_hub.train.policies.stable_diffusion import StableDiffusion

    predict = StableDiffusion.predict

    def predict_few(self, latents, timesteps, rows):
        if len(latents) > 2:
            raise torch.OutOfMemoryError("too many")
        return predict(self, latents, timesteps, rows)

    monkeypatch.setattr(StableDiffusion, "predict", predict_few)
    adapter = run(tmp_path, batch_size=8, validate_every=0)
    assert [record.message for record in caplog.records if "out of memory" in record.message] == [
        "out of memory with 8 pictures in a U-Net call; going on with 4",
        "out of memory with 4 pictures in a U-Net call; going on with 2",
    ]
    undisturbed = read_adapter(whole / ADAPTER)
    for name in adapter.layers:
        torch.testing.assert_close(adapter.delta(name), undisturbed.delta(name), rtol=1e-2, atol=1e-4)


def test_the_batch_is_found_by_a_probe_and_kept_for_the_rest_of_the_run(tmp_path, monkeypatch):
    from texforce_hub.train import memory

    policy, _ = make_policy()
    row = memory.saved_bytes(policy)
    assert memory.saved_bytes(make_policy(checkpointing=True)[0]) < 0.5 * row
    monkeypatch.setattr(memory, "_free_bytes", lambda device: int(5.5 * row / 0.7))
    assert memory.fit_batch(policy) == 5
    run(tmp_path, batch_size=0, steps=1)
    assert saved(tmp_path).facts["batch_size"] == 5
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 1)
    run(tmp_path, batch_size=0, steps=2)
    assert saved(tmp_path).facts["batch_size"] == 5


def test_offload_and_tiling_leave_the_vae_as_it_was_and_change_no_bit(whole, tmp_path, monkeypatch):
    vae, moves = tiny_pipeline().vae, []
    move = vae.to

    def note(device):
        moves.append(str(device))
        return move(device)

    monkeypatch.setattr(vae, "to", note)
    run(tmp_path, offload=True, tiling=True)
    assert moves.count("cpu") > 3  # after every decoding
    assert not vae.use_tiling
    assert bits(tmp_path) == bits(whole)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_tracker_that_is_not_there_is_named(tmp_path, name, monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "is_tensorboard_available", lambda: False)
    with pytest.raises(TrainingError, match=f"track = '{name}'; expected one of tensorboard, wandb, trackio"):
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


def test_a_killed_run_draws_the_sheet_that_it_owes(tmp_path):
    run(tmp_path, sheet_every=2, steps=2)
    (tmp_path / "samples" / "step-2.png").unlink()
    (tmp_path / "lines.txt").write_text("a red circle\n")
    run(tmp_path, sheet_every=2, steps=3, samples=str(tmp_path / "lines.txt"))
    assert (tmp_path / "samples" / "step-2.png").is_file()


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


@pytest.mark.parametrize(("source", "base"), [(None, "me/other"), ("shapes:size", "shapes"), ("no/such.txt", "shapes")])
def test_prompts_that_cannot_be_are_refused(source, base):
    with pytest.raises(PromptError):
        load_prompts(source, base=base, canonical=0.5)


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from tests.train.test_run import run
steps, die_at, algorithm = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
if die_at:
    from texforce_hub.files import checkpoint
    write = checkpoint.write_tensors
    def write_and_die(path, tensors):
        write(path, tensors)
        if f"checkpoint-{die_at}." in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.write_tensors = write_and_die
print("ready", flush=True)
run(sys.argv[1], steps=steps, algorithm=algorithm)
"""


def start_child(folder, *, steps=3, die_at=0, algorithm="streaming"):
    """A process that trains in ``folder``; returns once it begins. It kills itself while writing ``die_at``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [str(folder), str(ROOT), str(steps), str(die_at), algorithm]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, env=environment, cwd=ROOT
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


def finish_child(folder, *, steps=3, algorithm="streaming"):
    """Train in ``folder`` to the end; returns the seconds from the beginning of the run to its end."""
    child = start_child(folder, steps=steps, algorithm=algorithm)
    began = time.monotonic()
    assert child.wait(timeout=600) == 0
    return time.monotonic() - began


def kill_after(folder, seconds, *, steps=3, algorithm="streaming"):
    """``kill -9`` a training process so long after it began; returns whether it was still running."""
    child = start_child(folder, steps=steps, algorithm=algorithm)
    time.sleep(seconds)
    running = child.poll() is None
    child.kill()
    child.wait()
    return running


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_killed_run_goes_on_with_the_same_bits(whole, tmp_path):
    child = start_child(tmp_path)
    wait_for(lambda: list_checkpoints(tmp_path))
    child.send_signal(signal.SIGKILL)
    child.wait()
    resumed = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(tmp_path, on_step=lambda report: resumed.append(report.step))
    finally:
        torch.set_num_threads(threads)
    assert resumed in ([2, 3], [3], [])
    assert bits(tmp_path) == bits(whole)
