"""check: will it fit, layer by layer, before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from texforce_hub import cli
from texforce_hub.adapter import Adapter, LowRank
from texforce_hub.check import check_adapter, read_base
from texforce_hub.errors import DialectError, FamilyError, PipelineError
from texforce_hub.families import FAMILIES
from texforce_hub.sources import write_adapter

GOLDEN = Path(__file__).parent / "golden"
BASE = GOLDEN / "era0" / "base"
TEXT = "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj"


def write(path, width, layers, part="text_encoder"):
    names = [TEXT.format(i).replace("text_encoder", part, 1) for i in range(layers)]
    return write_adapter(Adapter({n: LowRank(torch.ones(2, width), torch.ones(width, 2)) for n in names}), path)


@pytest.mark.parametrize(
    ("width", "layers", "base", "fits"),
    [
        (768, 12, "sd1", True),
        (768, 12, "sdxl", True),
        (1024, 23, "sd2", True),
        (96, 3, "shapes", True),
        (768, 12, "sd2", False),
        (1024, 23, "sd1", False),
        (768, 13, "sd1", False),
    ],
)
def test_a_family_answers_by_its_shapes(tmp_path, width, layers, base, fits):
    fit = check_adapter(write(tmp_path / "a.safetensors", width, layers), base)
    assert fit.fits is fits
    assert len(fit.matched) + len(fit.unmatched) + len(fit.misshapen) == layers
    assert fit.verdict.startswith("fits" if fits else "does not fit")
    assert "\n" not in fit.verdict


@pytest.mark.parametrize(
    "case", ["era0/texforce_peft", "era0/dpok_save_0", "era1/texforce_train_r16a16", "era1/trl_ddpo"]
)
def test_a_pipelines_folder_answers_by_its_files(case):
    assert check_adapter(GOLDEN / case, BASE).fits
    assert not check_adapter(GOLDEN / case, "sd1").fits


def test_a_folder_with_configs_alone_answers_too(tmp_path):
    part = tmp_path / "text_encoder"
    part.mkdir()
    shutil.copy(BASE / "text_encoder" / "config.json", part)
    assert check_adapter(GOLDEN / "era0" / "texforce_peft", tmp_path).fits
    unet = tmp_path / "unet"
    unet.mkdir()
    (unet / "config.json").write_text(
        json.dumps({"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024})
    )
    unets = [{n for n in base.weights if n.startswith("unet.")} for base in (read_base(tmp_path), FAMILIES["sd2"])]
    assert unets[0] == unets[1]
    (unet / "config.json").write_text("{}")
    with pytest.raises(PipelineError, match="no known model"):
        read_base(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "shape", "family"),
    [
        ("model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight", (1, 768), "sd1"),
        ("model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight", (1, 1024), "sd2"),
        ("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias", (1280,), "sdxl"),
        ("model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias", (8,), "sd3"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", (128,), "flux"),
    ],
)
def test_a_checkpoint_file_answers_by_its_tensors_names(tmp_path, tensor, shape, family):
    save_file({tensor: torch.zeros(shape), "other": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert read_base(tmp_path / "x.safetensors").weights == FAMILIES[family].weights


def test_a_hub_id_answers_if_it_names_its_family():
    assert read_base("stable-diffusion-v1-5/stable-diffusion-v1-5").weights == FAMILIES["sd1"].weights
    assert read_base("stabilityai/stable-diffusion-xl-base-1.0").weights == FAMILIES["sdxl"].weights


def test_other_bases_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(PipelineError, match="has none of the folders"):
        read_base(tmp_path / "empty")
    with pytest.raises(PipelineError, match="no known checkpoint"):
        read_base(tmp_path / "x.safetensors")
    with pytest.raises(FamilyError, match="no known base"):
        read_base("me/mystery")
    with pytest.raises(DialectError, match=r"x\.safetensors"):
        check_adapter(tmp_path / "x.safetensors", "sd1")


def test_a_text_encoder_that_fits_only_another_goes_there_and_it_is_said(tmp_path):
    fit = check_adapter(write(tmp_path / "a.safetensors", 768, 12, part="text_encoder_2"), "sd1")
    assert fit.fits
    assert fit.notes == ("named text_encoder_2 in the adapter, fits only text_encoder",)


def test_the_command_answers_with_its_exit_code(tmp_path):
    path = write(tmp_path / "a.safetensors", 768, 12)
    yes = CliRunner().invoke(cli.app, ["check", str(path), "--base", "sd1"])
    no = CliRunner().invoke(cli.app, ["check", str(path), "--base", "sd2", "--json"])
    listed = CliRunner().invoke(cli.app, ["check", str(path), "--base", "sd2"])
    assert (yes.exit_code, no.exit_code, listed.exit_code) == (0, 1, 1)
    assert yes.stdout.startswith("fits: all 12 layers match Stable Diffusion 1.x")
    answer = json.loads(no.stdout)
    assert (answer["fits"], len(answer["misshapen"])) == (False, 12)
    assert "(1024, 1024)" in listed.stdout
