"""Bases in every layout: folders, single files, names."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel

from tests.support.pipelines_saved import load, original_topology, saved, text_out, write_tuned_unet
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.errors import FamilyError, HubError, PipelineError
from texforce_hub.families import FAMILIES
from texforce_hub.files.container import open_header
from texforce_hub.files.writing import write_tensors
from texforce_hub.pipelines.save import save_pipeline
from texforce_hub.pipelines.save_checkpoint import save_checkpoint
from texforce_hub.pipelines.single_file import checkpoint_family, load_single_file, write_config
from texforce_hub.pipelines.tokenizer import write_tokenizer
from texforce_hub.pipelines.vocabulary import find_vocabulary

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_folder_loads_in_the_dtype_asked_for(shelf):
    pipe = load(saved(shelf))
    assert torch.equal(text_out(pipe), text_out(tiny_pipeline("sd1")))
    assert load(saved(shelf), dtype="float16").unet.dtype == torch.float16


def test_a_folder_with_fp16_files_only_loads(shelf, tmp_path):
    tiny_pipeline("sd1").to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert load(tmp_path / "half").text_encoder.dtype == torch.float32


def test_what_is_no_base_is_named(tmp_path):
    with pytest.raises(PipelineError, match="no base 'nowhere'"):
        load("nowhere")
    with pytest.raises(PipelineError, match=r"no model_index\.json"):
        load(tmp_path)
    write_tensors(tmp_path / "x.safetensors", {"conv_in.weight": torch.zeros(2, 2)})
    with pytest.raises(PipelineError, match="--unet"):
        load(tmp_path / "x.safetensors")


def test_a_password_in_the_endpoint_is_in_no_error_of_a_base(monkeypatch):
    def fail(*_, **__):
        raise OSError("We couldn't connect to 'http://me:word@host' to load the files")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)
    with pytest.raises(PipelineError, match=r"'http://\*\*\*@host'"):
        load("some/base")


def test_the_embedded_base_loads_by_name():
    assert type(load("shapes")).__name__ == "StableDiffusionPipeline"


def test_a_hub_id_without_a_network_is_one_clear_line():
    unet = "'owner/name' is no file or folder here, and as a Hub id"
    for given, words in (({"base": "owner/name"}, "hf download owner/name"), ({"unet": "owner/name"}, unet)):
        with pytest.raises((PipelineError, HubError), match=words) as caught:
            load(**{"base": "shapes", **given})
        assert "\n" not in str(caught.value)
        assert "stacktrace" not in str(caught.value)


def with_safety_checker(pipe):
    """The pipeline with a tiny safety checker that blacks out whatever it sees."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=tower, vision_config=vision, projection_dim=8)).eval()
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2.0)
        checker.special_care_embeds_weights.fill_(2.0)
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    parts = {**pipe.components, "safety_checker": checker, "feature_extractor": processor}
    return StableDiffusionPipeline(**parts, requires_safety_checker=True)


def test_a_base_with_a_safety_checker_keeps_it(tmp_path, caplog):
    from texforce_hub.generate.draw import DrawSettings, generate_images

    with_safety_checker(tiny_pipeline("sd1")).save_pretrained(tmp_path / "base")
    where, _ = write_tuned_unet("checkpoint folder", tmp_path / "tuned")
    pipe = load(tmp_path / "base", unet=where)
    settings = DrawSettings(("a cat", "a dog"), inference_steps=2, width=16, height=16)
    with apply_adapter(pipe, random_adapter(pipe)), caplog.at_level("WARNING", logger="texforce_hub"):
        images = generate_images(pipe, settings)
    assert all(set(image.tobytes()) == {0} for image in images)
    assert "blacked out 2 of 2 images" in caplog.text
    back = load(save_pipeline(pipe, tmp_path / "saved"))
    assert type(back.safety_checker).__name__ == "StableDiffusionSafetyChecker"
    assert torch.equal(back.safety_checker.concept_embeds_weights, pipe.safety_checker.concept_embeds_weights)


def test_a_checkpoint_of_another_topology_is_refused():
    with pytest.raises(FamilyError, match="2 levels of 1 layers"):
        save_checkpoint(load("shapes"), "never.safetensors")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_saved_checkpoint_is_read_back_exactly(family, tmp_path):
    pipe = original_topology(family)
    pipe.save_pretrained(tmp_path / "folder")
    adapter = random_adapter(pipe)
    with apply_adapter(pipe, adapter, mode="fuse"):
        file = save_checkpoint(pipe, tmp_path / "x.safetensors")
        wanted = {n: t.clone() for n, t in pipe.text_encoder.state_dict().items()}
        wanted_unet = {n: t.clone() for n, t in pipe.unet.state_dict().items()}
        wanted_vae = {n: t.clone() for n, t in pipe.vae.state_dict().items()}
    assert checkpoint_family(open_header(file)) == family
    back = load_single_file(file, torch.float32, config=tmp_path / "folder")
    for module, state in ((back.unet, wanted_unet), (back.vae, wanted_vae), (back.text_encoder, wanted)):
        found = module.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[n], state[n]) for n in state)
    if family == "sdxl":
        with apply_adapter(pipe, adapter, mode="fuse"):
            assert torch.equal(text_out(back, "text_encoder_2"), text_out(pipe, "text_encoder_2"))


LITERAL = {
    "sd1": "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
    "sd2": "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
    "sdxl": "conditioner.embedders.1.model.text_projection",
}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_saved_checkpoint_has_the_names_that_other_tools_look_for(family, tmp_path):
    names = set(open_header(save_checkpoint(original_topology(family), tmp_path / "x.safetensors")).tensors)
    attention = "4.1" if family == "sdxl" else "1.1"  # SDXL has no attention at its first level
    assert {
        LITERAL[family],
        f"model.diffusion_model.input_blocks.{attention}.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.out.2.weight",
        "model.diffusion_model.time_embed.0.weight",
        "first_stage_model.encoder.down.0.downsample.conv.weight",
        "first_stage_model.decoder.up.3.block.0.norm1.weight",
        "first_stage_model.decoder.up.1.upsample.conv.weight",
        "first_stage_model.encoder.mid.attn_1.proj_out.weight",
        "first_stage_model.decoder.norm_out.weight",
        "first_stage_model.quant_conv.weight",
    } <= names
    assert ("model.diffusion_model.label_emb.0.0.weight" in names) == (family == "sdxl")


def test_the_vocabulary_is_clips(tmp_path):
    from transformers import CLIPTokenizer

    try:
        find_vocabulary()
    except PipelineError as error:
        pytest.skip(str(error))
    write_tokenizer(tmp_path / "tokenizer", padding="!")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer(["a photo of a cat"]).input_ids == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    assert len(tokenizer) == 49408
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 77)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_shipped_configurations_are_the_familys(family, tmp_path, monkeypatch):
    monkeypatch.setattr("texforce_hub.pipelines.single_file.write_tokenizer", lambda *a, **k: None)
    folder = tmp_path / family
    write_config(family, folder)
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    index = json.loads((folder / "model_index.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((folder / "unet/config.json").read_text()))
        AutoencoderKL.from_config(json.loads((folder / "vae/config.json").read_text()))
        shapes = {f"unet.{n}": tuple(t.shape) for n, t in unet.state_dict().items()}
        for part in (p for p in index if p.startswith("text_encoder")):
            config = CLIPTextConfig.from_dict(json.loads((folder / part / "config.json").read_text()))
            kind = CLIPTextModelWithProjection if index[part][1].endswith("Projection") else CLIPTextModel
            model = kind(config)
            prefix = f"{part}." if hasattr(model, "text_model") else f"{part}.text_model."
            shapes |= {prefix + n: tuple(t.shape) for n, t in model.state_dict().items() if "position_ids" not in n}
    expected = {n: s for n, s in FAMILIES[family].weights.items() if n in shapes}
    assert expected == shapes
    assert len(expected) == len(FAMILIES[family].weights)
