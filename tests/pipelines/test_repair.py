"""Pipelines that were saved with live adapters, and the files of the real old libraries."""

from pathlib import Path

import pytest
import torch

from tests.support.pipelines_saved import load, saved, text_out, unet_out
from tests.support.pipelines_tiny import tiny_pipeline
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.errors import PipelineError
from texforce_hub.pipelines.repair import repair_pipeline
from texforce_hub.pipelines.save import save_pipeline
from texforce_hub.pipelines.spoilt import repair_state

GOLDEN = Path(__file__).parents[1] / "golden"


def spoil(folder):
    from peft import LoraConfig, inject_adapter_in_model

    pipe = tiny_pipeline("sd1")
    base_unet, base_text = unet_out(pipe.unet), text_out(pipe)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    inject_adapter_in_model(config, pipe.text_encoder)
    tuned = unet_out(pipe.unet), text_out(pipe)
    pipe.save_pretrained(folder)
    return (base_unet, base_text), tuned


def test_a_pipeline_saved_with_live_adapters_is_repaired_both_ways(tmp_path, caplog):
    base, tuned = spoil(tmp_path / "spoilt")
    for wanted, keep in ((tuned, True), (base, False)):
        pipe = repair_pipeline(tmp_path / "spoilt", tuned=keep)
        assert torch.allclose(unet_out(pipe.unet), wanted[0], atol=1e-5)
        assert torch.allclose(text_out(pipe), wanted[1], atol=1e-5)
    with caplog.at_level("WARNING", logger="texforce_hub"):
        pipe = load(tmp_path / "spoilt")
    assert torch.allclose(unet_out(pipe.unet), tuned[0], atol=1e-5)
    assert "saved with live adapters" in caplog.text
    with_unet = load(save_pipeline(tiny_pipeline("sd1"), tmp_path / "base"), unet=tmp_path / "spoilt")
    assert torch.allclose(unet_out(with_unet.unet), tuned[0], atol=1e-5)


def test_a_pipeline_whose_encoder_was_saved_as_an_adapter_only_is_named(tmp_path):
    from peft import LoraConfig

    pipe = tiny_pipeline("sd1")
    pipe.text_encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    pipe.save_pretrained(tmp_path / "p")
    with pytest.raises(PipelineError, match="its base was not saved"):
        load(tmp_path / "p")


def test_a_sound_pipeline_needs_no_repair_and_half_an_adapter_has_none(shelf):
    with pytest.raises(PipelineError, match="needs no repair"):
        repair_pipeline(saved(shelf))
    state = {"x.base_layer.weight": torch.ones(2, 2), "x.lora_A.default.weight": torch.ones(1, 2)}
    with pytest.raises(PipelineError, match="other half"):
        repair_state(state)


def golden_outputs(pipe):
    ids = torch.arange(77).unsqueeze(0) * 5 % 512
    generator = torch.Generator().manual_seed(3)
    x, e = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 32, generator=generator)
    with torch.no_grad():
        return pipe.text_encoder(ids)[0], pipe.unet(x, 10, e).sample


golden = pytest.mark.skipif(not (GOLDEN / "era0" / "base").is_dir(), reason="no golden files here")


@golden
@pytest.mark.parametrize("mode", ["attach", "fuse"])
def test_an_old_unet_lora_and_a_texforce_release_compose_in_one_call(mode):
    gold = torch.load(GOLDEN / "era0" / "ref.pt", weights_only=True)
    pipe = load(GOLDEN / "era0" / "base")
    text, noise = golden_outputs(pipe)
    assert torch.allclose(text, gold["te_base"], atol=2e-5)
    assert torch.allclose(noise, gold["unet_base"], atol=2e-5)
    stack = [GOLDEN / "era0" / "dpok_save_0" / "pytorch_lora_weights.bin", GOLDEN / "era0" / "texforce_peft"]
    with apply_adapter(pipe, stack, mode=mode):
        text, noise = golden_outputs(pipe)
    assert torch.allclose(text, gold["te_peft"], atol=2e-5)
    assert torch.allclose(noise, gold["unet_attnprocs"], atol=2e-5)


@golden
def test_the_spoilt_folder_of_a_trainer_gives_the_tuned_and_the_base_unet():
    tuned = torch.load(GOLDEN / "era1" / "ref.pt", weights_only=True)["trl_unet"]
    base = torch.load(GOLDEN / "era0" / "ref.pt", weights_only=True)["unet_base"]
    folder = GOLDEN / "era1" / "trl_ddpo"
    assert torch.allclose(golden_outputs(repair_pipeline(folder))[1], tuned, atol=2e-5)
    assert torch.allclose(golden_outputs(repair_pipeline(folder, tuned=False))[1], base, atol=2e-5)
    assert torch.allclose(golden_outputs(load(GOLDEN / "era0" / "base", unet=folder))[1], tuned, atol=2e-5)
    lora = GOLDEN / "era0" / "dpok_save_0"
    gold = torch.load(GOLDEN / "era0" / "ref.pt", weights_only=True)["unet_attnprocs"]
    assert torch.allclose(golden_outputs(load(GOLDEN / "era0" / "base", unet=lora))[1], gold, atol=2e-5)
