"""Every layout of a tuned U-Net is put into a pipeline."""

import pytest
import torch

from tests.support.pipelines_saved import (
    load,
    original_topology,
    saved,
    text_out,
    tuned_unet,
    unet_out,
    write_tuned_unet,
)
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.errors import FamilyError, PipelineError
from texforce_hub.hub.write import write_adapter
from texforce_hub.pipelines.save_checkpoint import save_checkpoint

KINDS = ["pipeline", "checkpoint folder", "old pickle", "ema", "repository root", "bare state dict"]


@pytest.mark.parametrize("kind", [*KINDS, "bare in a folder", "fp16 files"])
def test_every_layout_of_a_full_unet_is_put_in_under_a_text_stack(kind, shelf, tmp_path):
    where, unet = write_tuned_unet(kind, tmp_path / "tuned")
    pipe = load(saved(shelf), unet=where)
    assert torch.equal(unet_out(pipe.unet), unet_out(unet))
    adapter = random_adapter(pipe)
    before = text_out(pipe)
    with apply_adapter(pipe, adapter):
        assert not torch.allclose(text_out(pipe), before, atol=1e-3)
        assert torch.equal(unet_out(pipe.unet), unet_out(unet))
    assert torch.equal(text_out(pipe), before)


def test_a_training_run_gives_its_latest_checkpoint(shelf, tmp_path):
    for number, seed in ((50, 4), (100, 5)):
        tuned_unet(seed).save_pretrained(tmp_path / "run" / f"checkpoint-{number}" / "unet")
    assert torch.equal(unet_out(load(saved(shelf), unet=tmp_path / "run").unet), unet_out(tuned_unet(5)))
    adapter = random_adapter(tiny_pipeline("sd1"), parts=["unet"])
    write_adapter(adapter, tmp_path / "logs" / "checkpoint_3")
    write_adapter(adapter.scaled(0.0), tmp_path / "logs" / "checkpoint_2")
    gold = load(saved(shelf), unet=tmp_path / "logs" / "checkpoint_3")
    assert torch.equal(unet_out(load(saved(shelf), unet=tmp_path / "logs").unet), unet_out(gold.unet))


def test_a_checkpoint_in_the_original_layout_is_a_tuned_unet_too(tmp_path):
    pipe = original_topology("sd1")
    pipe.save_pretrained(tmp_path / "base")
    gold = unet_out(pipe.unet)
    file = save_checkpoint(pipe, tmp_path / "civitai.safetensors")
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.zero_()
    pipe.save_pretrained(tmp_path / "zero")
    assert torch.equal(unet_out(load(tmp_path / "zero", unet=file).unet), gold)


@pytest.mark.parametrize("dialect", ["diffusers", "peft", "kohya"])
def test_a_unet_lora_is_put_in_at_its_weight(dialect, shelf, tmp_path):
    adapter = random_adapter(tiny_pipeline("sd1"), parts=["unet"])
    where = write_adapter(adapter, tmp_path / "lora", dialect=dialect)
    gold = tiny_pipeline("sd1")
    with apply_adapter(gold, adapter, weight=0.5, mode="fuse"):
        expected = unet_out(gold.unet)
    pipe = load(saved(shelf), unet=f"{where}:0.5")
    assert torch.allclose(unet_out(pipe.unet), expected, atol=1e-5)
    assert not hasattr(pipe.unet, "peft_config")


def test_a_unet_of_another_family_is_refused_before_it_is_read(shelf, tmp_path, monkeypatch):
    saved(shelf, "sd2")
    monkeypatch.setattr("texforce_hub.pipelines.unet.read_state", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(FamilyError, match=r"another family.*text width 32"):
        load(saved(shelf), unet=saved(shelf, "sd2"))
    with pytest.raises(PipelineError, match="takes no weight"):
        load(saved(shelf), unet=f"{saved(shelf)}:0.5")


def test_a_text_adapter_is_no_unet(shelf, tmp_path):
    where = write_adapter(random_adapter(tiny_pipeline("sd1")), tmp_path / "text")
    with pytest.raises(PipelineError, match="--adapter"):
        load(saved(shelf), unet=where)
