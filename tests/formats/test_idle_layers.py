"""Layers of zeros decide nothing: not the family, not whether a file fits, and they are named."""

import pytest
import torch
from safetensors.torch import save_file

from tests.support.pipelines_tiny import tiny_pipeline
from texforce_hub import apply_adapter, check_adapter, inspect_file, read_adapter
from texforce_hub.errors import MatchError
from texforce_hub.hub.convert import convert_adapter

CLIP = "text_encoders.clip_l.transformer"


def pair(stem, out, inner, value):
    return {
        f"{stem}.lora_up.weight": torch.full((out, 2), value) * torch.tensor([1.0, -1.0]),
        f"{stem}.lora_down.weight": torch.tensor([[1.0], [0.5]]).repeat(1, inner),
    }


def extraction(folder, projection, width=768):
    """What ComfyUI extracts of an SD1 text encoder, which there has a projection."""
    name = f"{CLIP}.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = pair(name, width, width, 0.5) | pair(name.replace("q_proj", "v_proj"), width, width, 0.5)
    tensors |= pair(f"{CLIP}.text_projection", width, width, projection)
    save_file(tensors, folder / "extracted.safetensors")
    return folder / "extracted.safetensors"


def test_a_projection_of_zeros_leaves_an_sd1_file_what_it_is(tmp_path, caplog):
    file = extraction(tmp_path, 0.0)
    facts = inspect_file(file)
    assert "sd1" in facts.families
    assert any("1 layer of zeros, e.g. text_encoder.text_projection" in line for line in facts.problems)
    fit = check_adapter(file, "sd1")
    assert fit.fits
    assert any("text_projection" in note for note in fit.notes)
    assert len(read_adapter(file).layers) == 2
    assert "text_projection" in caplog.text
    assert len(read_adapter(convert_adapter(file, tmp_path / "k.safetensors", dialect="kohya")).layers) == 2


def test_a_projection_that_changes_something_is_left_out_nowhere(tmp_path):
    file = extraction(tmp_path, 0.25)
    assert "sd1" not in inspect_file(file).families
    fit = check_adapter(file, "sd1")
    assert not fit.fits
    assert list(fit.unmatched) == ["text_encoder.text_projection"]


def test_a_layer_of_zeros_that_the_pipeline_lacks_is_named_and_the_rest_is_applied(tmp_path, caplog):
    pipe = tiny_pipeline("sd1")
    width = pipe.text_encoder.config.hidden_size
    before = pipe.text_encoder.state_dict()["encoder.layers.0.self_attn.q_proj.weight"].clone()
    with apply_adapter(pipe, extraction(tmp_path, 0.0, width), mode="fuse") as applied:
        assert applied is not None
        after = pipe.text_encoder.state_dict()["encoder.layers.0.self_attn.q_proj.weight"]
        assert not torch.equal(before, after)
    assert "text_projection is all zeros and left out" in caplog.text
    with pytest.raises(MatchError, match="strict=False"):
        apply_adapter(pipe, extraction(tmp_path, 0.25, width))
