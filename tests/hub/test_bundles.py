"""One adapter in several files: shards, cloneofsimo's halves, PEFT folders of parts; and what stays many."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from texforce_hub import cli
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.fit import check_adapter
from texforce_hub.errors import AdapterError, DialectError, FileError, RefError
from texforce_hub.families import FAMILIES
from texforce_hub.hub.bundles import bundle_file, bundle_folder, plan_bundle
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.convert_many import plan_conversions
from texforce_hub.hub.find import find_bundle, find_bundles
from texforce_hub.hub.inspect import inspect_file
from texforce_hub.hub.measure import measure_file
from texforce_hub.hub.read import open_adapter, read_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.merge import merge_adapters

TEXT = "text_model.encoder.layers.{}.self_attn.q_proj"
UNET = "down_blocks.0.attentions.0.transformer_blocks.0.{}"


def low_rank(width, seed, rank=4, out=None):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, width, generator=generator), torch.randn(out or width, rank, generator=generator), 2.0
    )


def sd1_parts():
    """The text encoder's and the U-Net's half of one SD1 adapter, and the whole."""
    text = {f"text_encoder.{TEXT.format(i)}": low_rank(768, i) for i in range(2)}
    inputs = {"attn1.to_q": 320, "attn2.to_k": 768}
    unet = {f"unet.{UNET.format(name)}": low_rank(width, width, rank=2, out=320) for name, width in inputs.items()}
    return Adapter(text), Adapter(unet), Adapter(text | unet)


def same(one, other):
    assert one.layers.keys() == other.layers.keys()
    for name in one.layers:
        torch.testing.assert_close(one.delta(name), other.delta(name), rtol=0, atol=1e-5)


def write_parts(folder, text="text_encoder", unet="unet"):
    first, second, whole = sd1_parts()
    write_adapter(first, folder / text, dialect="peft")
    write_adapter(second, folder / unet, dialect="peft")
    return whole


def write_shards(folder, stem="adapter_model", count=2):
    """A PEFT file cut through its layers: one half of a layer may lie in another shard than the other."""
    text, _, _ = sd1_parts()
    write_adapter(text, folder / "whole", dialect="peft")

    tensors = load_file(folder / "whole" / "adapter_model.safetensors")
    names = sorted(tensors)
    (folder / "adapter_config.json").write_bytes((folder / "whole" / "adapter_config.json").read_bytes())
    index: dict[str, str] = {}
    for number in range(count):
        name = f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"
        mine = names[number::count]
        save_file({key: tensors[key] for key in mine}, folder / name)
        index |= dict.fromkeys(mine, name)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for path in (folder / "whole").iterdir():
        path.unlink()
    (folder / "whole").rmdir()
    return text


def write_cloneofsimo(folder, stem="lora_weight"):
    """Two lists in the order in which the trainer walked the models, up and down in turn."""

    def walk(part, ends):
        weights = FAMILIES["sd1"].weights
        return [n.removesuffix(".weight") for n in weights if n.startswith(f"{part}.") and n.endswith(ends)]

    ends = tuple(f"{name}.weight" for name in ("k_proj", "v_proj", "q_proj", "out_proj"))
    names = [name for name in walk("text_encoder", ends) if ".self_attn." in name]
    blocks = list(dict.fromkeys(name.partition(".attn1.")[0] for name in walk("unet", ".weight") if ".attn1." in name))
    order = [b for b in blocks if "down" in b] + [b for b in blocks if "up_" in b] + [b for b in blocks if "mid" in b]
    unet = [f"{b}.{a}.{p}" for b in order for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out.0")]
    for ending, layers in ((".pt", unet), (".text_encoder.pt", names)):
        values = []
        for i, name in enumerate(layers):
            out, width = FAMILIES["sd1"].weights[f"{name}.weight"]
            layer = low_rank(width, i, rank=1, out=out)
            values += [layer.up, layer.down]
        torch.save(values, folder / f"{stem}{ending}")
    return [*unet, *names]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("text", "unet"),
    [("text_encoder", "unet"), ("text_encoder_lora", "unet_lora"), ("text_encoder_one_lora", "unet")],
)
def test_peft_folders_of_parts_are_one_adapter(tmp_path, text, unet):
    whole = write_parts(tmp_path / "both", text, unet)
    same(read_adapter(tmp_path / "both"), whole)
    stored = open_adapter(tmp_path / "both")
    assert set(stored.layers) == set(whole.layers)
    outline = open_adapter(tmp_path / "both", checked=False).outline
    assert {name: layer.shape for name, layer in outline.layers.items()} == {
        name: layer.shape for name, layer in whole.layers.items()
    }
    assert read_adapter(tmp_path / "both").family == "sd1"


def test_several_parts_become_a_folder_of_peft_folders_that_is_read_as_one(tmp_path):
    _, _, whole = sd1_parts()
    path = write_adapter(whole, tmp_path / "in" / "cat.safetensors")
    (tmp_path / "in" / "cat.json").write_text('{"notes": "mine"}')
    output = tmp_path / "out" / "cat"
    assert run("convert", path, "--output", output, "--dialect", "peft").exit_code == 0
    assert sorted(one.name for one in output.iterdir()) == ["text_encoder", "unet"]
    assert (tmp_path / "out" / "cat.json").is_file()
    same(read_adapter(output), whole)
    assert [one.ending for one in inspect_file(find_bundle(output)).sidecars] == [".json"]
    with pytest.raises(FileError, match="text_encoder, unet are a folder each; name a new folder"):
        write_adapter(whole, output, dialect="peft")
    with pytest.raises(FileError, match="name a new folder"):
        write_adapter(whole, tmp_path / "new.safetensors", dialect="peft")


def test_of_several_parts_that_cannot_all_be_written_none_is(tmp_path):
    _, _, whole = sd1_parts()
    name = next(name for name in whole.layers if name.startswith("unet"))
    broken = Adapter({**whole.layers, name: replace(whole.layers[name], up=whole.layers[name].up * 1e30)})
    with pytest.raises(AdapterError):
        write_adapter(broken, tmp_path / "out" / "cat", dialect="peft", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_one_folder_of_a_part_is_that_part(tmp_path):
    text, _, _ = sd1_parts()
    write_adapter(text, tmp_path / "x" / "text_encoder", dialect="peft")
    same(read_adapter(tmp_path / "x"), text)
    same(read_adapter(tmp_path / "x" / "text_encoder"), text)


def test_a_folder_names_the_text_encoder_that_tensors_leave_open(tmp_path):
    first = Adapter({f"text_encoder.{TEXT.format(0)}": low_rank(768, 0)})
    second = Adapter({f"text_encoder_2.{TEXT.format(0)}": low_rank(1280, 1)})
    third = Adapter({"text_encoder_2.encoder.block.0.layer.0.SelfAttention.q": low_rank(4096, 2)})
    write_adapter(first, tmp_path / "sdxl" / "text_encoder", dialect="peft")
    write_adapter(second, tmp_path / "sdxl" / "text_encoder_2", dialect="peft")
    assert read_adapter(tmp_path / "sdxl").parts == ("text_encoder", "text_encoder_2")
    assert plan_bundle(find_bundle(tmp_path / "sdxl")).family.candidates == ("sdxl", "sd3")
    write_adapter(third, tmp_path / "flux" / "text_encoder_2", dialect="peft")
    assert read_adapter(tmp_path / "flux").parts == ("text_encoder_2",)
    assert read_adapter(tmp_path / "flux" / "text_encoder_2").parts == ("text_encoder_2",)


def test_each_part_keeps_the_alpha_of_its_own_config(tmp_path):
    write_parts(tmp_path)
    for part, alpha in (("text_encoder", 8), ("unet", 1)):
        config = json.loads((tmp_path / part / "adapter_config.json").read_text())
        config["lora_alpha"] = alpha
        (tmp_path / part / "adapter_config.json").write_text(json.dumps(config))
    scales = {name.partition(".")[0]: layer.scale for name, layer in read_adapter(tmp_path).layers.items()}
    assert scales == {"text_encoder": 8 / 4, "unet": 1 / 2}


def test_shards_are_one_file(tmp_path):
    whole = write_shards(tmp_path, count=3)
    shard = tmp_path / "adapter_model-00002-of-00003.safetensors"
    for ref in (tmp_path, shard):
        same(read_adapter(ref), whole)
    assert [bundle.stem for bundle in find_bundles(tmp_path)] == ["adapter_model"]
    shard.unlink()
    with pytest.raises(FileError, match="2 of 3 shards of adapter_model are here"):
        read_adapter(tmp_path)


def test_a_shard_that_repeats_another_is_refused(tmp_path):
    write_shards(tmp_path)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(FileError, match="which another shard holds too"):
        read_adapter(tmp_path)


def test_cloneofsimos_two_lists_are_one_adapter(tmp_path):
    names = write_cloneofsimo(tmp_path)
    both = read_adapter(tmp_path)
    assert set(both.layers) == set(names)
    assert both.family == "sd1"
    assert read_adapter(tmp_path / "lora_weight.pt").parts == ("unet",)
    write_cloneofsimo(tmp_path, "other")
    with pytest.raises(RefError, match=r"holds 2 adapters, lora_weight\.pt, other\.pt"):
        read_adapter(tmp_path)
    assert len(find_bundles(tmp_path)) == 2


def test_a_layer_in_both_files_counts_once_if_equal_and_is_refused_if_not(tmp_path):
    text, _, whole = sd1_parts()
    write_parts(tmp_path)
    write_adapter(text, tmp_path / "text_encoder_lora", dialect="peft")
    same(read_adapter(tmp_path), whole)
    assert any("equal ones count once" in note for note in plan_bundle(find_bundle(tmp_path)).notes)
    write_adapter(text.scaled(0.5), tmp_path / "text_encoder_lora", dialect="peft")
    for read in (read_adapter, open_adapter):
        with pytest.raises(DialectError, match="unequal values"):
            read(tmp_path)


def test_halves_of_different_models_are_refused(tmp_path):
    write_parts(tmp_path)
    wide = Adapter({f"text_encoder.{TEXT.format(0)}": low_rank(1024, 0)})
    for path in (tmp_path / "text_encoder").iterdir():
        path.unlink()
    write_adapter(wide, tmp_path / "text_encoder", dialect="peft")
    with pytest.raises(DialectError, match="do not belong together"):
        read_adapter(tmp_path)
    assert inspect_file(find_bundle(tmp_path)).error is not None


def test_a_damaged_half_is_named(tmp_path):
    write_parts(tmp_path)
    (tmp_path / "unet" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(FileError, match=r"unet/adapter_model\.safetensors: is empty"):
        read_adapter(tmp_path)
    facts = inspect_file(find_bundle(tmp_path))
    assert "unet" in (facts.error or "")


def test_an_adapter_file_of_a_usual_name_comes_before_folders_of_parts(tmp_path):
    whole = write_parts(tmp_path)
    text, _, _ = sd1_parts()
    write_adapter(text, tmp_path)  # pytorch_lora_weights.safetensors
    same(read_adapter(tmp_path), text)
    assert [bundle.path.parent.name for bundle in find_bundles(tmp_path)] == [tmp_path.name, "text_encoder", "unet"]
    (tmp_path / "pytorch_lora_weights.safetensors").unlink()
    same(read_adapter(tmp_path), whole)


def test_other_files_are_an_adapter_each(tmp_path):
    text, unet, _ = sd1_parts()
    write_adapter(text, tmp_path / "a_text_encoder.safetensors")
    write_adapter(unet, tmp_path / "a_unet.safetensors")
    with pytest.raises(RefError, match="holds 2 adapters"):
        read_adapter(tmp_path)
    write_parts(tmp_path / "deep")
    (tmp_path / "plain" / "unet").mkdir(parents=True)
    (tmp_path / "plain" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")  # a model, not PEFT's
    found = [bundle.path.relative_to(tmp_path).as_posix() for bundle in find_bundles(tmp_path)]
    model = "plain/unet/diffusion_pytorch_model.safetensors"
    assert found == ["a_text_encoder.safetensors", "a_unet.safetensors", "deep", model]
    assert all(bundle.is_one_file for bundle in bundle_folder(tmp_path))
    assert bundle_file(tmp_path / "a_unet.safetensors").pieces[0].part is None


@pytest.mark.parametrize("name", ["CAT.SAFETENSORS", "Cat.SafeTensors"])
def test_endings_in_capitals_are_endings(tmp_path, name):
    text, _, _ = sd1_parts()
    path = write_adapter(text, tmp_path / name)
    assert path.is_file()
    torch.save(load_file(path), tmp_path / "DOG.PT")
    (tmp_path / f"{path.stem}.json").write_text('{"sd version": "SD1"}')
    table = run("inspect", tmp_path, "--json")
    found = {Path(one["path"]).name: one for one in json.loads(table.stdout)["files"]}
    assert found.keys() == {name, "DOG.PT"}
    assert [one["kind"] for one in found[name]["sidecars"]] == ["A1111"]
    same(read_adapter(path), text)


def test_a_folder_of_parts_beside_another_adapter_must_be_named(tmp_path):
    text, _, whole = sd1_parts()
    write_parts(tmp_path)
    write_adapter(text, tmp_path / "cat.safetensors")
    with pytest.raises(RefError, match="holds 2 adapters"):
        read_adapter(tmp_path)
    (tmp_path / "cat.safetensors").unlink()
    same(read_adapter(tmp_path), whole)


def test_a_whole_models_shards_are_no_rival_of_an_adapter(tmp_path):
    text, _, _ = sd1_parts()
    for number, key in ((1, "conv_in.weight"), (2, "conv_out.weight")):
        name = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({key: torch.ones(4, 4, 3, 3)}, tmp_path / name)
    with pytest.raises(RefError, match="holds no adapter file"):
        read_adapter(tmp_path)
    write_adapter(text, tmp_path / "cat.safetensors")
    same(read_adapter(tmp_path), text)
    found = json.loads(run("inspect", tmp_path, "--json").stdout)["files"]
    assert [one["error"] is None for one in found] == [True, False]


def test_it_is_put_on_a_pipeline_as_one(tmp_path):
    from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
    from texforce_hub.apply.applied import apply_adapter

    pipe = tiny_pipeline("sd1")
    whole = random_adapter(pipe, parts=["text_encoder", "unet"])
    assert set(whole.parts) == {"text_encoder", "unet"}
    for part in whole.parts:
        write_adapter(whole.only(part), tmp_path / part, dialect="peft")

    def weights():
        modules = (pipe.text_encoder, pipe.unet)
        return [parameter.detach().clone() for module in modules for parameter in module.parameters()]

    with apply_adapter(pipe, whole, mode="fuse"):
        expected = weights()
    plain = weights()
    assert not all(torch.equal(one, other) for one, other in zip(plain, expected, strict=True))
    with apply_adapter(pipe, str(tmp_path), mode="fuse"):
        for one, other in zip(weights(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_inspect_says_that_it_is_one_adapter_in_several_files(tmp_path):
    write_parts(tmp_path / "both")
    (tmp_path / "both.json").write_text(json.dumps({"activation text": "hello"}))
    panel = run("inspect", tmp_path / "both")
    assert panel.exit_code == 0
    assert "of 2 files" in panel.stdout
    assert "unet/adapter_model.safetensors" in panel.stdout
    assert "trigger words: hello" in panel.stdout
    (found,) = json.loads(run("inspect", tmp_path, "--json").stdout)["files"]
    assert (found["parts"], len(found["files"])) == ({"text_encoder": 2, "unet": 2}, 2)
    assert found["sha256"] is None
    (weighed,) = json.loads(run("inspect", tmp_path, "--json", "--weights").stdout)["files"]
    assert len(weighed["weights"]) == 4
    assert len(measure_file(find_bundle(tmp_path / "both"))) == 4


def test_check_convert_and_merge_take_it_as_one(tmp_path):
    whole = write_parts(tmp_path / "both")
    assert check_adapter(tmp_path / "both", "sd1").fits
    assert len(check_adapter(tmp_path / "both", "sd1").matched) == 4
    assert not check_adapter(tmp_path / "both", "sdxl").fits
    written = convert_adapter(tmp_path / "both", tmp_path / "one.safetensors", dialect="kohya")
    same(read_adapter(written), whole)
    other = write_adapter(whole.scaled(0.5), tmp_path / "half.safetensors")
    merged = merge_adapters([(str(tmp_path / "both"), 1.0), (str(other), 1.0)], "cat")
    name = next(iter(whole.layers))
    torch.testing.assert_close(merged.adapter.delta(name), whole.delta(name) * 1.5, rtol=0, atol=1e-3)


def test_a_merge_from_several_files_is_recorded_and_checked_again(tmp_path):
    whole = write_parts(tmp_path / "both")
    other = write_adapter(whole.scaled(0.5), tmp_path / "half.safetensors")
    output = tmp_path / "merged.safetensors"
    shown = run("merge", tmp_path / "both", other, "--output", output, "--method", "cat")
    assert shown.exit_code == 0, shown.output
    assert run("verify", output).exit_code == 0
    write_adapter(sd1_parts()[1].scaled(2.0), tmp_path / "both" / "unet", dialect="peft")
    again = run("verify", output)
    assert "it changed" in str(again.exception) + again.output


def test_a_folder_is_converted_adapter_by_adapter(tmp_path):
    write_parts(tmp_path / "in" / "both")
    (tmp_path / "in" / "cut").mkdir()
    write_shards(tmp_path / "in" / "cut", stem="model")
    targets = [job.target for job in plan_conversions([tmp_path / "in"], tmp_path / "out", "kohya")]
    assert [str(one.relative_to(tmp_path / "out")) for one in targets] == ["both.safetensors", "cut/model.safetensors"]
    shown = run("convert", tmp_path / "in", "--output", tmp_path / "out", "--dialect", "kohya")
    assert shown.exit_code == 0, shown.output
    same(read_adapter(tmp_path / "out" / "both.safetensors"), sd1_parts()[2])
