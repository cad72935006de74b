"""Files for other programs: every key is held against the key map of the program that shall read it."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from texforce_hub import cli
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Vector
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import ConfigError, DialectError
from texforce_hub.families import FAMILIES
from texforce_hub.families.original_transformer import FLUX, SD3, XLABS
from texforce_hub.formats.codec.encoding import encode
from texforce_hub.formats.codec.fitting import describe_gaps, fit_reader
from texforce_hub.formats.dialects import DIALECTS
from texforce_hub.formats.readers import READERS, find_reader
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.inspect import inspect_file
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter

MAPS = tomllib.loads((Path(__file__).parents[1] / "keys" / "readers.toml").read_text())
CASES = [(reader, family) for reader, maps in MAPS.items() for family in maps if family != "code"]
BLOCK = "text_encoder.text_model.encoder.layers.0"
TEXT = f"{BLOCK}.self_attn.out_proj"


def low_rank(out=768, inner=768):
    return LowRank(torch.randn(2, inner), torch.randn(out, 2))


def sd1(**more):
    unet = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    return Adapter({TEXT: low_rank(), f"{unet}.attn2.to_k": low_rank(320, 768), **more})


def stem_of(key):
    return key.partition(".")[0]


def layer_names(family):
    """Every layer of a family that a file can change, in ``diffusers``' names and in the authors'."""
    row = FAMILIES[family]
    for name, shape in row.weights.items():
        if name.endswith(".weight"):
            yield name if len(shape) == 1 else name.removesuffix(".weight")
    for template in {"flux": {**FLUX, **XLABS}, "sd3": SD3}.get(family, {}):
        yield f"transformer.{template.replace('#', '0')}"


@pytest.mark.parametrize(("reader", "family"), CASES)
def test_a_layer_has_a_slot_where_the_programs_own_map_has_its_key(reader, family):
    patterns = [re.compile(pattern.replace("#", "[0-9]+")) for pattern in MAPS[reader][family]]
    seen = set()
    for name in layer_names(family):
        role = "diff" if name.endswith(".weight") else "down"
        try:
            stem = stem_of(DIALECTS["kohya"].write_name(name, role, family))
        except DialectError:  # it has no flat name at all
            continue
        in_map = any(pattern.fullmatch(stem) for pattern in patterns)
        assert READERS[reader].has_slot(name, family, "kohya") == in_map, (name, stem)
        seen.add(in_map)
    assert True in seen


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_kohya_s_layout_of_transformers_uses_prefixes_that_are_looked_for(family):
    names = [name for name in layer_names(family) if name.startswith("transformer.") and not name.endswith(".weight")]
    patterns = [re.compile(pattern.replace("#", "[0-9]+")) for pattern in MAPS["comfyui"][family]]
    stems = {stem_of(DIALECTS["kohya"].write_name(name, "down", family)) for name in names}
    assert {stem.split("_")[1] for stem in stems} == {"unet", "transformer"}
    unknown = {stem for stem in stems if not any(pattern.fullmatch(stem) for pattern in patterns)}
    assert unknown <= {"lora_unet_single_blocks_0_qkv"}  # XLabs' name of some rows, which no other program has


def test_a_norms_scale_and_shift_are_written_as_lycoris_spells_them_and_a_lone_shift_as_it_is_read():
    norm = "unet.down_blocks.0.attentions.0.norm"
    both = sd1(**{f"{norm}.weight": Vector(torch.randn(320)), f"{norm}.bias": Vector(torch.randn(320))})
    stem = "lora_unet_down_blocks_0_attentions_0_norm"
    assert {key for key in encode(both, "kohya").tensors if key.startswith(stem)} == {
        f"{stem}.w_norm",
        f"{stem}.b_norm",
    }
    lone = sd1(**{f"{norm}.bias": Vector(torch.randn(320))})
    assert f"{stem}.diff_b" in encode(lone, "kohya").tensors
    fitted, _ = fit_reader(lone, find_reader("a1111"))
    assert {key for key in encode(fitted, "kohya").tensors if key.startswith(stem)} == {
        f"{stem}.w_norm",
        f"{stem}.b_norm",
    }
    assert not fitted.delta(f"{norm}.weight").any()


@pytest.mark.parametrize("reader", ["a1111", "comfyui", "forge"])
def test_dora_with_one_magnitude_per_output_row_is_refused_for_those_who_compute_another(tmp_path, reader, caplog):
    rows = sd1(**{f"{BLOCK}.mlp.fc2": Decomposed(low_rank(768, 3072), torch.rand(768), "out")})
    file = write_adapter(rows, tmp_path / "rows.safetensors", dialect="kohya")
    assert "1 DoRA layers have one magnitude per output row" in caplog.text
    with pytest.raises(DialectError, match=r"computed otherwise there.*texforce-hub resize FILE --base"):
        convert_adapter(file, tmp_path / "out.safetensors", reader=reader)
    assert not (tmp_path / "out.safetensors").exists()
    inputs = sd1(**{f"{BLOCK}.mlp.fc2": Decomposed(low_rank(768, 3072), torch.rand(3072), "in")})
    write_adapter(inputs, file, dialect="kohya")
    assert (
        read_adapter(convert_adapter(file, tmp_path / "out.safetensors", reader=reader)).layers.keys()
        == inputs.layers.keys()
    )


def test_diffusers_and_peft_get_dora_by_rows_and_refuse_the_other(tmp_path):
    rows = Adapter({f"{BLOCK}.mlp.fc2": Decomposed(low_rank(768, 3072), torch.rand(768), "out")})
    inputs = Adapter({f"{BLOCK}.mlp.fc2": Decomposed(low_rank(768, 3072), torch.rand(3072), "in")})
    for reader in ("diffusers", "peft"):
        file = write_adapter(rows, tmp_path / "rows.safetensors", dialect="kohya")
        assert convert_adapter(file, tmp_path / reader, reader=reader).exists()
        write_adapter(inputs, file, dialect="kohya")
        with pytest.raises(DialectError, match="one magnitude per input"):
            convert_adapter(file, tmp_path / f"not-{reader}", reader=reader)


def test_what_a_program_has_no_slot_for_is_said_and_refused_for_it(tmp_path, caplog):
    norm = f"{BLOCK}.layer_norm1"
    adapter = sd1(**{f"{norm}.weight": Vector(torch.randn(768)), f"{norm}.bias": Vector(torch.randn(768))})
    file = write_adapter(adapter, tmp_path / "norms.safetensors", dialect="kohya")
    assert f"for ComfyUI, Forge: no slot for 2 of 4 layers, e.g. {norm}.weight" in caplog.text
    with pytest.raises(DialectError, match="Forge cannot read this exactly: no slot for 2 of 4"):
        convert_adapter(file, tmp_path / "forge.safetensors", reader="forge")
    assert convert_adapter(file, tmp_path / "a1111.safetensors", reader="a1111").exists()
    comfy = load_file(convert_adapter(file, tmp_path / "comfy.safetensors", reader="comfyui"))
    assert all(key.startswith(("text_encoders.", "diffusion_model.")) for key in comfy)  # its own layout has the slots


@pytest.mark.parametrize(
    ("family", "block", "width"), [("flux", "single_transformer_blocks", 3072), ("sd3", "transformer_blocks", 1536)]
)
def test_diffusers_names_of_a_transformer_are_not_written_in_comfyuis_own_layout(family, block, width, tmp_path):
    name = f"transformer.{block}.0.attn.to_q"
    adapter = Adapter({name: low_rank(width, width)}, {"texforce_hub.family": family})
    with pytest.raises(DialectError, match=r"original names in this layout.*write it as 'kohya'"):
        write_adapter(adapter, tmp_path / "x.safetensors", dialect="comfy")
    assert not list(tmp_path.iterdir())
    file = write_adapter(adapter, tmp_path / "x.safetensors", dialect="kohya")
    converted = load_file(convert_adapter(file, tmp_path / "y.safetensors", reader="comfyui"))
    assert all(key.startswith("lora_transformer_") for key in converted)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_every_transformer_key_of_comfyuis_own_layout_is_a_key_of_the_model(family):
    """There every weight has the key ``diffusion_model.`` and its name in the authors' code."""
    template = {"flux": {**FLUX, **XLABS}, "sd3": SD3}[family]
    written = 0
    for name in layer_names(family):
        try:
            key = DIALECTS["comfy"].write_name(name, "down", family)
        except DialectError:
            continue
        if name.startswith("transformer."):
            written += 1
            module = key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight")
            assert re.sub(r"(?<=blocks\.)[0-9]+", "#", module) in template
    assert written == len(template)


def test_t5_is_refused_for_diffusers_which_drops_it():
    t5 = Adapter({"text_encoder_3.encoder.block.0.layer.0.SelfAttention.q": low_rank(4096, 4096)})
    with pytest.raises(DialectError, match="no slot for 1 of 1"):
        fit_reader(t5, find_reader("diffusers"))


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a1111_gets_an_open_clip_blocks_attention_whole(family, tmp_path, caplog):
    part, width = ("text_encoder", 1024) if family == "sd2" else ("text_encoder_2", 1280)
    block = f"{part}.text_model.encoder.layers.3.self_attn"
    adapter = Adapter({f"{block}.q_proj": low_rank(width, width)}, {"texforce_hub.family": family})
    file = write_adapter(adapter, tmp_path / "q.safetensors", dialect="kohya")
    assert "for A1111: 3 layers of zeros are missed" in caplog.text
    written = read_adapter(convert_adapter(file, tmp_path / "all.safetensors", reader="a1111"))
    assert {name.rpartition(".")[2] for name in written.layers} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert all(not written.delta(name).any() for name in written.layers if not name.endswith("q_proj"))
    torch.testing.assert_close(written.delta(f"{block}.q_proj"), adapter.delta(f"{block}.q_proj"))


def test_a_file_of_sdxl_s_text_encoders_alone_is_not_taken_for_sd1(tmp_path, caplog):
    both = {TEXT: low_rank(), TEXT.replace("text_encoder.", "text_encoder_2."): low_rank(1280, 1280)}
    file = write_adapter(Adapter(both), tmp_path / "te.safetensors", dialect="kohya")
    assert inspect_file(file).metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert "the header says SDXL" in caplog.text


def test_a_family_can_be_named_where_the_layers_fit_several(tmp_path):
    file = write_adapter(Adapter({TEXT: low_rank()}), tmp_path / "te.safetensors")
    written = convert_adapter(file, tmp_path / "xl.safetensors", dialect="kohya", family="sdxl")
    assert all(key.startswith("lora_te1_") for key in load_file(written))
    facts = inspect_file(written)
    assert (facts.families, facts.metadata["ss_base_model_version"]) == (("sdxl",), "sdxl_base_v1-0")
    with pytest.raises(ConfigError, match="--family sd2: the layers are CLIP-L alone"):
        convert_adapter(file, tmp_path / "x.safetensors", family="sd2")


def test_the_command_writes_for_a_program_or_a_layout_and_not_for_both(tmp_path):
    file = write_adapter(sd1(), tmp_path / "x.safetensors")
    arguments = ["convert", str(file), "--output", str(tmp_path / "y.safetensors"), "--for", "forge"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert inspect_file(tmp_path / "y.safetensors").dialects == ("kohya",)
    both = CliRunner().invoke(cli.app, [*arguments, "--dialect", "peft"])
    assert isinstance(both.exception, ConfigError)
    unknown = CliRunner().invoke(cli.app, [*arguments[:-1], "fooocus"])
    assert "no reader 'fooocus'; known: a1111, comfyui, forge, diffusers, peft" in str(unknown.exception)


def test_the_refiner_s_lone_encoder_has_the_prefix_that_comfyui_looks_for(tmp_path):
    name = TEXT.replace("text_encoder.", "text_encoder_2.")
    adapter = Adapter({name: low_rank(1280, 1280)}, {"texforce_hub.family": "sdxl-refiner"})
    file = write_adapter(adapter, tmp_path / "x.safetensors", dialect="kohya")
    assert all(key.startswith("lora_te_text_model") for key in load_file(file))
    assert list(read_adapter(file).layers) == [name]


def test_xlabs_flux_files_are_read_as_diffusers_converts_them(tmp_path):
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    width, tensors = 48, {}
    shapes = {"qkv_lora1": 3, "qkv_lora2": 3, "proj_lora1": 1, "proj_lora2": 1}
    for block, layers in (("double_blocks.0", shapes), ("single_blocks.1", {"qkv_lora": 3, "proj_lora": 1})):
        for layer, times in layers.items():
            inner = 5 * width if (block, layer) == ("single_blocks.1", "proj_lora") else width
            tensors[f"{block}.processor.{layer}.down.weight"] = torch.randn(2, inner)
            tensors[f"{block}.processor.{layer}.up.weight"] = torch.randn(times * width, 2)
    save_file(tensors, tmp_path / "xlabs.safetensors")
    assert inspect_file(tmp_path / "xlabs.safetensors").dialects == ("xlabs",)
    ours = load_file(convert_adapter(tmp_path / "xlabs.safetensors", tmp_path / "plain.safetensors"))
    theirs = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    names = {key.removesuffix(".lora_A.weight") for key in theirs if key.endswith("A.weight")}
    assert {key.removesuffix(".lora_A.weight") for key in ours if key.endswith("A.weight")} == names
    for name in names:
        change = theirs[f"{name}.lora_B.weight"] @ theirs[f"{name}.lora_A.weight"]
        torch.testing.assert_close(ours[f"{name}.lora_B.weight"] @ ours[f"{name}.lora_A.weight"], change)


def test_a_transformers_file_without_a_part_and_in_kohya_s_halves_is_read(tmp_path):
    names = ("attn.add_k_proj", "img_mlp.net.0.proj", "txt_mod.1")
    tensors = {f"transformer_blocks.0.{n}.lora_down.weight": torch.ones(2, 8) for n in names}
    tensors |= {f"transformer_blocks.0.{n}.lora_up.weight": torch.ones(8, 2) for n in names}
    tensors |= {f"transformer_blocks.0.{n}.alpha": torch.tensor(4.0) for n in names}
    save_file(tensors, tmp_path / "qwen.safetensors")
    adapter = read_adapter(tmp_path / "qwen.safetensors")
    assert [float(layer.scale) for layer in adapter.layers.values()] == [2.0, 2.0, 2.0]
    assert set(adapter.layers) == {f"transformer.transformer_blocks.0.{n}" for n in names}


def test_a_safetensors_file_that_is_no_adapter_is_called_one(tmp_path):
    save_file({"some.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    facts = inspect_file(tmp_path / "x.safetensors")
    assert (facts.container, facts.error is not None) == ("safetensors", True)


def test_what_every_program_reads_is_not_spoken_of():
    assert list(describe_gaps(sd1(), "kohya")) == []
