"""Runs in little memory: smaller slices, a probed batch, parts that wait on the CPU, a small decoder."""

import threading
import types

import pytest
import torch
from diffusers import AutoencoderTiny

from tests.support.training import bits, make_policy, run, saved, short_config, tiny_pipeline
from texforce_hub.errors import PipelineError
from texforce_hub.hub.read import read_adapter
from texforce_hub.rewards.reward import Reward
from texforce_hub.train.algorithms.streaming import streaming
from texforce_hub.train.judge import Judge
from texforce_hub.train.policies import policy as policies
from texforce_hub.train.policies.frozen import frozen
from texforce_hub.train.run_folder import ADAPTER


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
    with frozen(policy.pipeline):
        row = memory.saved_bytes(policy)
    with frozen(policy.pipeline, checkpointing=True):
        assert memory.saved_bytes(policy) < 0.5 * row
    monkeypatch.setattr(memory, "_free_bytes", lambda device: int(5.5 * row / 0.7))
    assert memory.fit_batch(policy) == 5
    run(tmp_path, batch_size=0, steps=1)
    assert saved(tmp_path).facts["batch_size"] == 5
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 1)
    run(tmp_path, batch_size=0, steps=2)
    assert saved(tmp_path).facts["batch_size"] == 5


def test_offload_has_on_the_device_only_what_is_at_work_and_changes_no_bit(whole, tmp_path, monkeypatch):
    pipe, waits, together = tiny_pipeline(), {}, []
    move, call = policies.move_frozen, pipe.unet.forward

    def note(module, device):
        waits[type(module).__name__] = device == "cpu" and isinstance(device, str)
        move(module, device)

    def forward(*arguments, **options):
        together.append(dict(waits))
        return call(*arguments, **options)

    monkeypatch.setattr(policies, "move_frozen", note)
    monkeypatch.setattr(pipe.unet, "forward", forward)
    run(tmp_path, offload=True)
    assert {name for seen in together for name in seen} == {"AutoencoderKL", "CLIPTextModel"}
    assert all(all(seen.values()) for seen in together)
    assert bits(tmp_path) == bits(whole)


def test_tiling_leaves_the_decoder_as_it_was_and_changes_rounding_alone(whole, tmp_path):
    run(tmp_path, tiling=True)
    assert not tiny_pipeline().vae.use_tiling
    assert not tiny_pipeline().vae.use_slicing
    tiled, plain = read_adapter(tmp_path / ADAPTER), read_adapter(whole / ADAPTER)
    for name in plain.layers:
        torch.testing.assert_close(tiled.delta(name), plain.delta(name), rtol=1e-2, atol=1e-4)


class Network(torch.nn.Linear):
    """Notes where it is asked to go."""

    def __init__(self):
        super().__init__(2, 2)
        self.devices = []

    def to(self, *arguments, **options):
        self.devices.append(str(arguments[0]))
        return super().to(*arguments, **options)


def test_a_rewards_networks_are_found_wherever_it_holds_them_and_wait_while_pictures_are_drawn():
    networks = [Network() for _ in range(3)]

    class Holder:
        def __init__(self):
            self.inner = types.SimpleNamespace(network=networks[0])

        def score(self, images, prompts):
            return images.mean((1, 2, 3))

    def enclosing(network):
        return lambda images, prompts: images.mean((1, 2, 3)) + 0 * network.weight.sum()

    functions = [Holder().score, enclosing(networks[1]), networks[2]]
    for function, network in zip(functions, networks, strict=True):
        judge = Judge([Reward("mine", function)], short_config("unused", offload=True, images_per_prompt=2))
        judge.see(torch.rand(2, 3, 4, 4), ["a", "a"])
        assert network.devices == []
        if function is not network:
            judge.advantages()
            assert network.devices == ["cpu", "cpu"]  # to the pictures' device, and back


def test_a_small_decoder_takes_the_place_of_the_vae_for_the_run_alone(tmp_path):
    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    blocks |= {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    torch.manual_seed(1)
    channels = tiny_pipeline().vae.config.latent_channels
    AutoencoderTiny(**blocks, latent_channels=channels).save_pretrained(tmp_path / "tiny")
    AutoencoderTiny(latent_channels=channels).save_pretrained(tmp_path / "larger")
    vae = tiny_pipeline().vae
    run(tmp_path / "run", decoder=str(tmp_path / "tiny"), validate_every=0, steps=1)
    assert tiny_pipeline().vae is vae
    assert str(tmp_path) not in str(dict(read_adapter(tmp_path / "run" / ADAPTER).metadata))
    run(tmp_path / "own", validate_every=0, steps=1)
    assert bits(tmp_path / "run") != bits(tmp_path / "own")
    for name, says in (("larger", "8 times as large"), ("nowhere", "expected an AutoencoderTiny")):
        with pytest.raises(PipelineError, match=says) as caught:
            run(tmp_path / "other", decoder=str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_a_reward_elsewhere_answers_while_the_next_pictures_are_drawn():
    drawn = threading.Event()
    policy, _ = make_policy(batch_size=2)  # four slices
    predict, calls = type(policy).predict, []

    class Noting(type(policy)):
        def predict(self, latents, timesteps, rows):
            calls.append(len(latents))
            if len(calls) > len(self.make_steps(4).timesteps):  # the second slice has begun
                drawn.set()
            return predict(self, latents, timesteps, rows)

    def score(images, prompts):
        assert drawn.wait(60)
        return images.mean((1, 2, 3))

    noting = Noting(policy.pipeline, policy.encoders, policy.scheduler, policy.config)
    results = []
    for who, remote in ((noting, True), (policy, False)):
        judge = Judge([Reward("mine", score, remote=remote)], policy.config)
        update = next(streaming(who, ["a red circle", "a lime disc"], judge, torch.Generator().manual_seed(0)))
        results.append((judge.scores, update.cotangents[0]))
    for here, there in zip(*results, strict=True):
        assert torch.equal(here, there)
