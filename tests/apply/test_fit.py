"""check: will it fit, layer by layer, before anything is loaded."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from texforce_hub import cli
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.base import read_base
from texforce_hub.apply.fit import check_adapter
from texforce_hub.cli.summary import by_reason
from texforce_hub.errors import DialectError, FamilyError, HubError, PipelineError
from texforce_hub.families import FAMILIES
from texforce_hub.families.original_clip import AROUND, OPEN_CLIP
from texforce_hub.families.original_unet import to_ldm
from texforce_hub.hub.write import write_adapter

GOLDEN = Path(__file__).parents[1] / "golden"
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


def write_claims(path, shapes):
    """A file of these tensors whose bytes are a hole: as large as a checkpoint, and taking no room."""
    offset, entries = 0, {}
    for name, shape in shapes.items():
        end = offset + math.prod(shape)
        entries[name] = {"dtype": "F8_E4M3", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + offset)
    return path


def original_names(family):
    """Every weight of a family as its authors' own code names it."""
    prefixes = {
        "sd1": {"text_encoder": "cond_stage_model.transformer."},
        "sd2": {"text_encoder": "cond_stage_model.model."},
        "sdxl": {
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        },
    }[family]
    for name, shape in FAMILIES[family].weights.items():
        part, _, path = name.partition(".")
        module, _, parameter = path.rpartition(".")
        if part == "unet":
            yield f"model.diffusion_model.{to_ldm(module, family)}.{parameter}", shape
        elif not prefixes[part].endswith(".model."):
            yield prefixes[part] + path, shape
        elif path in AROUND:
            yield prefixes[part] + AROUND[path], shape
        elif path == "text_projection.weight":
            yield f"{prefixes[part]}text_projection", shape[::-1]
        elif ".q_proj." in path:
            block = path.split(".")[3]
            yield f"{prefixes[part]}transformer.resblocks.{block}.attn.in_proj_{parameter}", (3 * shape[0], *shape[1:])
        elif ".k_proj." not in path and ".v_proj." not in path:
            block, inner = path.split(".")[3], ".".join(path.split(".")[4:-1])
            yield f"{prefixes[part]}transformer.resblocks.{block}.{OPEN_CLIP[inner]}.{parameter}", shape


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_checkpoint_file_answers_by_its_own_shapes(tmp_path, family):
    shapes = dict(original_names(family)) | {"first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3)}
    if family == "sd2":  # what the file holds and no pipeline reads
        shapes |= {f"cond_stage_model.model.transformer.resblocks.23.{n}.weight": (4, 4) for n in OPEN_CLIP.values()}
        shapes |= {"cond_stage_model.model.text_projection": (1024, 1024), "cond_stage_model.model.logit_scale": ()}
    base = read_base(write_claims(tmp_path / "x.safetensors", shapes))
    assert base.weights == FAMILIES[family].weights
    assert base.title == f"x.safetensors ({FAMILIES[family].title})"


def test_a_checkpoint_that_was_changed_is_compared_as_it_is(tmp_path):
    shapes = dict(original_names("sd1"))
    fc1 = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    path = write_claims(tmp_path / "x.safetensors", shapes | {fc1: (3000, 768)})
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    adapter = Adapter({name: LowRank(torch.ones(2, 768), torch.ones(3072, 2))})
    fit = check_adapter(write_adapter(adapter, tmp_path / "a.safetensors"), path)
    assert fit.misshapen == {name: "the adapter changes (3072, 768), the base's layer is (3000, 768)"}


def test_a_small_checkpoint_of_no_known_family_answers_too(tmp_path):
    names = {
        f"cond_stage_model.transformer.text_model.encoder.layers.{i}.self_attn.q_proj.weight": (8, 8) for i in (0, 1)
    }
    base = write_claims(tmp_path / "x.safetensors", names)
    assert check_adapter(write(tmp_path / "a.safetensors", 8, 2), base).fits


@pytest.mark.parametrize(
    ("tensor", "original", "family"),
    [
        ("joint_blocks.0.context_block.adaLN_modulation.1.bias", "joint_blocks.0.x_block.attn.qkv", "sd3"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_attn.qkv", "flux"),
    ],
)
def test_a_transformer_s_checkpoint_says_whose_shapes_it_goes_by(tmp_path, tensor, original, family):
    head = "model.diffusion_model." if family == "sd3" else ""
    path = write_claims(tmp_path / "x.safetensors", {head + tensor: (128,), f"{head}{original}.weight": (9, 3)})
    base = read_base(path)
    assert base.shape_of(f"transformer.{original}") == (9, 3)
    assert base.shape_of("transformer.transformer_blocks.0.attn.to_q") is not None
    assert base.parts == ("transformer",)
    assert "in diffusers' names have that family's shapes" in base.title


def test_half_a_layer_is_listed_as_what_it_is(tmp_path):
    halves = {
        f"{TEXT.format(0)}.lora_A.weight": torch.ones(2, 768),
        f"{TEXT.format(0)}.lora_B.weight": torch.ones(768, 2),
    }
    save_file(halves | {f"{TEXT.format(1)}.lora_A.weight": torch.ones(2, 768)}, tmp_path / "a.safetensors")
    fit = check_adapter(tmp_path / "a.safetensors", "sd1")
    assert (fit.matched, fit.misshapen) == ((TEXT.format(0),), {})
    assert fit.unreadable == {TEXT.format(1): f"{TEXT.format(1)}: lacks its up half (lora_B)"}
    assert fit.verdict.startswith("does not fit: of 2 layers, 1 cannot be read; the adapter is")
    listed = CliRunner().invoke(cli.app, ["check", str(tmp_path / "a.safetensors"), "--base", "sd1"])
    assert "lacks its up half" in listed.stdout


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
        read_base("mystery")
    with pytest.raises(HubError, match="'me/mystery' is no file or folder here, and as a Hub id: "):
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
    assert "fits: all 12 layers match Stable Diffusion 1.x" in yes.stdout
    answer = json.loads(no.stdout)
    assert (answer["fits"], len(answer["misshapen"])) == (False, 12)
    assert "(1024, 1024)" in listed.stdout


def test_layers_that_the_base_lacks_are_left_out_where_that_is_wished(tmp_path):
    path = write(tmp_path / "a.safetensors", 768, 13)
    fit = check_adapter(path, "sd1", strict=False)
    assert (fit.fits, len(fit.matched), len(fit.unmatched)) == (True, 12, 1)
    assert fit.verdict.startswith("fits in part: 12 of 13 layers match Stable Diffusion 1.x, 1 are not in it")
    assert not check_adapter(write(tmp_path / "b.safetensors", 1024, 12), "sd1", strict=False).fits
    loose = CliRunner().invoke(cli.app, ["check", str(path), "--base", "sd1", "--no-strict"])
    strict = CliRunner().invoke(cli.app, ["check", str(path), "--base", "sd1"])
    assert (loose.exit_code, strict.exit_code) == (0, 1)


def test_layers_that_miss_for_one_reason_share_a_line():
    fit = check_adapter("shapes-colour", "sd1")
    assert len(fit.misshapen) == 12
    assert by_reason(fit.misshapen) == ["12 layers: the adapter changes (96, 96), the base's layer is (768, 768)"]
