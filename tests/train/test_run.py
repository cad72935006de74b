"""Runs from start to finish: what they write, how they stop, that they go on with the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.support.training import short_config, tiny_pipeline
from texforce_hub.errors import ConfigError, PromptError, TrainingError
from texforce_hub.files.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint
from texforce_hub.files.tensors import read_tensors
from texforce_hub.generate.prompts.sets import load_prompts
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
    assert {p.name for p in whole.iterdir()} >= {ADAPTER, "config.toml", "metrics.jsonl", "reward.png", "samples"}
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
    encoder, parameters = attach_lora(pipe.text_encoder, rank=4, alpha=8.0, seed=0)
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
    import types

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


def test_the_best_weights_are_kept_and_remembered(tmp_path):
    adapter = run(tmp_path, keep="best", validate_every=1, learning_rate=0.05)
    state = saved(tmp_path)
    scores = dict(state.facts["validations"])
    assert sorted(scores) == [0, 1, 2, 3]
    assert int(adapter.metadata["texforce_hub.steps"]) == max(scores, key=lambda step: scores[step])


def test_training_on_brightness_makes_the_shapes_pipeline_draw_brighter(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    settings = {"steps": 8, "images_per_prompt": 16, "inference_steps": 6, "train_timesteps": 5, "learning_rate": 3e-3}
    settings |= {"guidance": 5.0, "advantage_floor": 0.05}
    validation = {"validate_every": 8, "validation_images": 8, "validation_steps": 8}
    config = short_config(
        tmp_path / "run",
        prompts=str(tmp_path / "prompts.txt"),
        **{"ema": 0.0, "warmup": 0, "decay": "constant", "rank": 16, "alpha": 16.0, **settings, **validation},
    )
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
def test_the_learning_rate_warms_up_and_decays(decay):
    config = short_config("unused", steps=10, warmup=4, decay=decay)
    shares = [learning_rate_share(config, step) for step in range(10)]
    assert shares[0] == pytest.approx(0.25)
    assert all(0 < share <= 1 for share in shares)
    assert (shares[-1] == 1) == (decay == "constant")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learning_rat": 1e-3}, "did you mean 'learning_rate'"),
        ({"steps": "many"}, "expected a whole number"),
        ({"steps": True}, "expected a whole number"),
        ({"kl": -1.0}, "at least 0"),
        ({"clip": 0.0}, "more than 0"),
        ({"clip": float("nan")}, "expected a number"),
        ({"uncond": "none"}, "'detach' or 'base' or 'full'"),
        ({"canonical": 1.5}, "from 0 to 1"),
        ({"skip_last": 10}, "leaves none"),
        ({"updates": 200}, "only 128 pictures"),
        ({"reward": []}, "no reward"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(settings, says):
    with pytest.raises(ConfigError, match=says):
        make_config({"output": "x", **settings})


def test_a_config_survives_toml(tmp_path):
    config = TrainConfig(output='a "b"\\c é', reward=("jpeg=-1", "brightness"), prompts="p.txt", kl=0.1)
    (tmp_path / "run.toml").write_text(write_settings(asdict(config)), encoding="utf-8")
    assert make_config(read_settings(tmp_path / "run.toml")) == config


def test_a_config_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_settings(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        read_settings(tmp_path / "none.toml")


def test_shapes_prompts_are_seen_combinations_half_of_them_canonical():
    from texforce_hub.shapes.grammar import NOISY_COLOURS, SPLITS, combination_class, parse

    prompts = load_prompts(None, base="shapes", canonical=0.5)
    drawn = [prompts.draw(step, 8, seed=0) for step in range(20)]
    assert drawn[3] == prompts.draw(3, 8, seed=0) != prompts.draw(3, 8, seed=1)
    for texts in drawn:
        assert len(set(texts)) == 8
        assert all(combination_class(parse(text)) in SPLITS["train"] for text in texts)
        assert sum(any(word in text.split() for word in NOISY_COLOURS.values()) for text in texts) == 4


def test_listed_prompts_come_all_before_any_comes_again(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n# no\ntwo\nthree\n")
    prompts = load_prompts(str(tmp_path / "p.txt"), base="anything", canonical=0.5)
    drawn = [text for step in range(3) for text in prompts.draw(step, 2, seed=0)]
    assert sorted(drawn[:3]) == sorted(drawn[3:]) == ["one", "three", "two"]
    assert len(prompts.sample(2)) == 2


@pytest.mark.parametrize(("source", "base"), [(None, "me/other"), ("shapes:size", "shapes"), ("no/such.txt", "shapes")])
def test_prompts_that_cannot_be_are_refused(source, base):
    with pytest.raises(PromptError):
        load_prompts(source, base=base, canonical=0.5)


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from tests.train.test_run import run
steps, die_at = int(sys.argv[3]), int(sys.argv[4])
if die_at:
    from texforce_hub.files import checkpoint
    write = checkpoint.write_tensors
    def write_and_die(path, tensors):
        write(path, tensors)
        if f"checkpoint-{die_at}." in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.write_tensors = write_and_die
print("ready", flush=True)
run(sys.argv[1], steps=steps)
"""


def start_child(folder, *, steps=3, die_at=0):
    """A process that trains in ``folder``; returns once it begins. It kills itself while writing ``die_at``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [str(folder), str(ROOT), str(steps), str(die_at)]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, env=environment, cwd=ROOT
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


def finish_child(folder, *, steps=3):
    """Train in ``folder`` to the end; returns the seconds from the beginning of the run to its end."""
    child = start_child(folder, steps=steps)
    began = time.monotonic()
    assert child.wait(timeout=600) == 0
    return time.monotonic() - began


def kill_after(folder, seconds, *, steps=3):
    """``kill -9`` a training process so long after it began; returns whether it was still running."""
    child = start_child(folder, steps=steps)
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
