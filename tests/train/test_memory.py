"""Runs in little memory: smaller slices, a probed batch, parts that wait on the CPU."""

import torch

from tests.support.training import bits, make_policy, run, saved, tiny_pipeline
from texforce_hub.hub.read import read_adapter
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
