"""What is written for other tools is read back."""

import json
import resource

import pytest
import torch

from tests.support.pipelines_saved import load, text_out
from tests.support.pipelines_tiny import random_adapter, tiny_clip, tiny_pipeline, tiny_tokenizer
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.errors import FileError, PipelineError
from texforce_hub.files.container import open_header
from texforce_hub.files.tensors import read_tensors
from texforce_hub.pipelines.save import save_pipeline
from texforce_hub.pipelines.save_checkpoint import save_checkpoint, save_text_encoder


def test_a_pipeline_with_live_adapters_is_not_saved(tmp_path):
    pipe = tiny_pipeline("sd1")
    with apply_adapter(pipe, random_adapter(pipe)):
        for save in (save_pipeline, save_checkpoint, save_text_encoder):
            with pytest.raises(PipelineError, match="fuse"):
                save(pipe, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("most", [100, 50_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(most, tmp_path):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, usual[1]))  # a file that grows beyond it fails as on a full disk
    try:
        with pytest.raises(FileError, match=r"saved: cannot be written"):
            save_pipeline(tiny_pipeline("sd1"), tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_safetensors_are_not_written_under_a_pickles_name(suffix, tmp_path):
    for family in ("sd1", "sdxl"):
        with pytest.raises(FileError, match=r"safetensors"):
            save_text_encoder(tiny_pipeline(family), tmp_path / f"x{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_a_portable_save_has_the_old_names_and_the_old_tokenizer_files(tmp_path):
    pipe = tiny_pipeline("sdxl")
    adapter = random_adapter(pipe)
    with apply_adapter(pipe, adapter, mode="fuse"):
        gold = text_out(pipe), text_out(pipe, "text_encoder_2")
        folder = save_pipeline(pipe, tmp_path / "p", portable=True)
    for part in ("text_encoder", "text_encoder_2"):
        names = open_header(folder / part / "model.safetensors").tensors
        assert all(n.startswith(("text_model.", "text_projection.")) for n in names)
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    assert vocabulary == tiny_tokenizer().get_vocab()
    assert (folder / "tokenizer" / "merges.txt").read_text().startswith("#version")
    back = load(folder)
    assert torch.allclose(text_out(back), gold[0], atol=1e-6)
    assert torch.allclose(text_out(back, "text_encoder_2"), gold[1], atol=1e-6)
    ids = [p.tokenizer(["a red cat"], padding="max_length", max_length=8).input_ids for p in (pipe, back)]
    assert ids[0] == ids[1]


def test_text_encoders_are_saved_under_the_names_that_comfyui_detects(tmp_path):
    paths = save_text_encoder(tiny_pipeline("sdxl"), tmp_path / "x.safetensors")
    assert [path.name for path in paths] == ["x_clip_l.safetensors", "x_clip_g.safetensors"]
    names = [set(open_header(path).tensors) for path in paths]
    assert all("text_model.encoder.layers.1.mlp.fc1.weight" in n for n in names)
    assert ["text_projection.weight" in n for n in names] == [False, True]
    [single] = save_text_encoder(tiny_pipeline("sd1"), tmp_path / "one.safetensors")
    state = read_tensors(single)[1]
    encoder = tiny_clip()
    encoder.load_state_dict({n.removeprefix("text_model."): t for n, t in state.items()})
    pipe = tiny_pipeline("sd1")
    with torch.no_grad():
        ids = torch.arange(16).unsqueeze(0)
        assert torch.equal(encoder(ids)[0], pipe.text_encoder(ids)[0])
    with pytest.raises(PipelineError, match="no CLIP"):
        save_text_encoder(tiny_pipeline("pixart"), tmp_path / "t5.safetensors")
