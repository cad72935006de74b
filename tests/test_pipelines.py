"""Bases in every layout, every U-Net partner, repair, and what is written for other tools is read back."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from tests.pipelines_tiny import random_adapter, tiny_clip, tiny_pipeline, tiny_tokenizer
from texforce_hub.apply import apply_adapter
from texforce_hub.container import open_header
from texforce_hub.errors import FamilyError, PipelineError
from texforce_hub.families import FAMILIES
from texforce_hub.files import read_tensors, write_tensors
from texforce_hub.pipelines import load_pipeline, repair_pipeline, save_checkpoint, save_pipeline, save_text_encoder
from texforce_hub.pipelines.repair import repair_state
from texforce_hub.pipelines.single_file import checkpoint_family, load_single_file, write_config
from texforce_hub.pipelines.vocabulary import find_vocabulary, write_tokenizer
from texforce_hub.sources import write_adapter

GOLDEN = Path(__file__).parent / "golden"


def text_out(pipe, part="text_encoder"):
    with torch.no_grad():
        return getattr(pipe, part)(torch.arange(16).unsqueeze(0) * 3 % 52)[0]


def unet_out(unet, cross=32, latents=4):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, latents, 8, 8, generator=generator)
    e = torch.randn(1, 16, cross, generator=generator)
    extra = {}
    if unet.config.addition_embed_type:
        extra["added_cond_kwargs"] = {"text_embeds": torch.ones(1, 40), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        return unet(x, 10, e, **extra).sample


@functools.cache
def saved(tmp, family="sd1"):
    folder = tmp / family
    tiny_pipeline(family).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelines")


def load(base, **options):
    return load_pipeline(base, device="cpu", **options)


# --- bases ------------------------------------------------------------------------------------------------


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


def test_the_embedded_base_loads_by_name():
    assert type(load("shapes")).__name__ == "StableDiffusionPipeline"


def test_a_hub_id_without_a_network_is_one_clear_line():
    for given, words in (({"base": "owner/name"}, "hf download owner/name"), ({"unet": "owner/name"}, "no U-Net")):
        with pytest.raises(PipelineError, match=words) as caught:
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
    from texforce_hub.generate import Settings, generate_images

    with_safety_checker(tiny_pipeline("sd1")).save_pretrained(tmp_path / "base")
    where, _ = write_partner("checkpoint folder", tmp_path / "partner")
    pipe = load(tmp_path / "base", unet=where)
    settings = Settings(("a cat", "a dog"), inference_steps=2, width=16, height=16)
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


# --- single files -----------------------------------------------------------------------------------------


def original_topology(family):
    """A tiny pipeline whose U-Net and VAE have the block structure of the original checkpoints."""
    pipe = tiny_pipeline(family)
    torch.manual_seed(1)
    channels: tuple[int, ...]
    cross: dict[str, Any] = {"down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)}
    cross["up_block_types"] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    channels = (32, 32, 64, 64)
    config = dict(pipe.unet.config)
    if family == "sdxl":
        cross = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")}
        cross["up_block_types"] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
        channels = (32, 32, 64)
    unet = UNet2DConditionModel.from_config({**config, **cross, "block_out_channels": channels, "layers_per_block": 2})
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
    )
    if family == "sd2":  # OpenCLIP's heads are 64 wide, and the library counts on it
        pipe.register_modules(text_encoder=tiny_clip(width=48, act="gelu"))
    pipe.register_modules(unet=unet.eval(), vae=vae.eval())
    return pipe


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
    assert checkpoint_family(open_header(file).tensors) == family
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
    write_tokenizer(tmp_path, padding="!")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer(["a photo of a cat"]).input_ids == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    assert len(tokenizer) == 49408
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 77)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_shipped_configurations_are_the_familys(family, tmp_path, monkeypatch):
    monkeypatch.setattr("texforce_hub.pipelines.single_file.write_tokenizer", lambda *a, **k: None)
    write_config(family, tmp_path)
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    index = json.loads((tmp_path / "model_index.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((tmp_path / "unet/config.json").read_text()))
        AutoencoderKL.from_config(json.loads((tmp_path / "vae/config.json").read_text()))
        shapes = {f"unet.{n}": tuple(t.shape) for n, t in unet.state_dict().items()}
        for part in (p for p in index if p.startswith("text_encoder")):
            config = CLIPTextConfig.from_dict(json.loads((tmp_path / part / "config.json").read_text()))
            kind = CLIPTextModelWithProjection if index[part][1].endswith("Projection") else CLIPTextModel
            model = kind(config)
            prefix = f"{part}." if hasattr(model, "text_model") else f"{part}.text_model."
            shapes |= {prefix + n: tuple(t.shape) for n, t in model.state_dict().items() if "position_ids" not in n}
    expected = {n: s for n, s in FAMILIES[family].weights.items() if n in shapes}
    assert expected == shapes
    assert len(expected) == len(FAMILIES[family].weights)


# --- partners ---------------------------------------------------------------------------------------------


def tuned_unet(seed=9):
    pipe = tiny_pipeline("sd1")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return pipe.unet


def write_partner(kind, folder):
    """A tuned U-Net as a trainer leaves it; gives what ``unet=`` takes and the U-Net that is meant."""
    unet = tuned_unet()
    if kind == "pipeline":
        pipe = tiny_pipeline("sd1")
        pipe.register_modules(unet=unet)
        pipe.save_pretrained(folder)
    elif kind == "checkpoint folder":
        unet.save_pretrained(folder / "unet")
        (folder / "optimizer.bin").write_bytes(b"x")
    elif kind == "old pickle":
        unet.save_pretrained(folder / "unet", safe_serialization=False)
    elif kind == "ema":
        unet.save_pretrained(folder / "unet_ema")
    elif kind == "repository root":
        unet.save_pretrained(folder)
    elif kind == "bare state dict":
        write_tensors(folder / "lightning_4step_unet.safetensors", unet.state_dict())
        return folder / "lightning_4step_unet.safetensors", unet
    elif kind == "bare in a folder":
        write_tensors(folder / "lightning_4step_unet.safetensors", unet.state_dict())
    elif kind == "fp16 files":
        unet.to(torch.float16).save_pretrained(folder / "unet", variant="fp16")
        unet.float()
    return folder, unet


KINDS = ["pipeline", "checkpoint folder", "old pickle", "ema", "repository root", "bare state dict"]


@pytest.mark.parametrize("kind", [*KINDS, "bare in a folder", "fp16 files"])
def test_every_layout_of_a_full_unet_is_put_in_under_a_text_stack(kind, shelf, tmp_path):
    where, unet = write_partner(kind, tmp_path / "partner")
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


def test_a_checkpoint_in_the_original_layout_is_a_partner_too(tmp_path):
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
    monkeypatch.setattr("texforce_hub.pipelines.partner.read_state", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(FamilyError, match=r"another family.*text width 32"):
        load(saved(shelf), unet=saved(shelf, "sd2"))
    with pytest.raises(PipelineError, match="takes no weight"):
        load(saved(shelf), unet=f"{saved(shelf)}:0.5")


def test_a_text_adapter_is_no_partner(shelf, tmp_path):
    where = write_adapter(random_adapter(tiny_pipeline("sd1")), tmp_path / "text")
    with pytest.raises(PipelineError, match="--adapter"):
        load(saved(shelf), unet=where)


# --- repair -----------------------------------------------------------------------------------------------


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
    tuned_partner = load(save_pipeline(tiny_pipeline("sd1"), tmp_path / "base"), unet=tmp_path / "spoilt")
    assert torch.allclose(unet_out(tuned_partner.unet), tuned[0], atol=1e-5)


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


# --- taking it away ---------------------------------------------------------------------------------------


def test_a_pipeline_with_live_adapters_is_not_saved(tmp_path):
    pipe = tiny_pipeline("sd1")
    with apply_adapter(pipe, random_adapter(pipe)):
        for save in (save_pipeline, save_checkpoint, save_text_encoder):
            with pytest.raises(PipelineError, match="fuse"):
                save(pipe, tmp_path / "x.safetensors")
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


# --- the files of the real old libraries ------------------------------------------------------------------


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
