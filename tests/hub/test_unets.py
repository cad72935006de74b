"""A tuned U-Net from the Hub: an adapter, or a whole one, as from a folder."""

import pytest
import torch

from tests.support.pipelines_saved import load, saved, tuned_unet, unet_out
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.errors import HubError, PipelineError
from texforce_hub.hub.write import write_adapter


def folder_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_unet_lora_on_the_hub_is_put_in_at_its_weight(hub, shelf, tmp_path):
    file = write_adapter(random_adapter(tiny_pipeline("sd1"), parts=["unet"]), tmp_path / "lora.safetensors")
    hub.commit("me/lora", {"lora.safetensors": file.read_bytes()})
    found = load(saved(shelf), unet="me/lora:0.5").unet
    assert torch.equal(unet_out(found), unet_out(load(saved(shelf), unet=f"{file}:0.5").unet))


@pytest.mark.parametrize("inside", ["unet", ""])
def test_a_whole_unet_on_the_hub_is_put_in(hub, shelf, tmp_path, inside):
    tuned_unet(4).save_pretrained(tmp_path / "tuned" / inside)
    files = folder_files(tmp_path / "tuned")
    weights = next(name for name in files if name.endswith(".safetensors"))
    hub.commit("me/tuned", files | {weights.replace(".safetensors", ".fp16.safetensors"): b"of no use", "big.bin": b""})
    assert torch.equal(unet_out(load(saved(shelf), unet="me/tuned").unet), unet_out(tuned_unet(4)))
    assert not any("fp16" in request.path or "big" in request.path for request in hub.log)
    with pytest.raises(PipelineError, match="is a whole U-Net, which takes no weight"):
        load(saved(shelf), unet="me/tuned:0.5")


def test_a_unet_on_the_hub_that_cannot_be_put_in_is_refused_in_a_line(hub, shelf, tmp_path):
    tuned_unet(4).save_pretrained(tmp_path / "tuned")
    config = {"config.json": (tmp_path / "tuned" / "config.json").read_bytes()}
    hub.commit("me/half", config)
    with pytest.raises(PipelineError, match=r"me/half@\w{12} has no weights file; .* it holds config\.json"):
        load(saved(shelf), unet="me/half")
    hub.commit("me/old", config | {"diffusion_pytorch_model.bin": b"x"})
    with pytest.raises(PipelineError, match="holds its U-Net as a pickle"):
        load(saved(shelf), unet="me/old")
    with pytest.raises(HubError, match="no such repository"):
        load(saved(shelf), unet="me/nothing")
