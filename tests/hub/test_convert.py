"""convert, and the names of files: every change kept, bulk or single, whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from texforce_hub import cli
from texforce_hub.adapter.dense import Vector
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import AdapterError, ConfigError, DialectError, FileError, HubError, RefError
from texforce_hub.hub.catalog import CatalogEntry, read_catalog
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.convert_many import convert_all, plan_conversions
from texforce_hub.hub.find import find_bundle, find_bundles, pick_file
from texforce_hub.hub.inspect import inspect_file
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter

GOLDEN = Path(__file__).parents[1] / "golden"
PEFT = GOLDEN / "era0" / "texforce_peft"


def same(one, other, atol=1e-6):
    assert one.layers.keys() == other.layers.keys()
    for name in one.layers:
        torch.testing.assert_close(one.delta(name), other.delta(name), rtol=0, atol=atol)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "peft"])
def test_a_converted_adapter_changes_the_same(tmp_path, dialect):
    written = convert_adapter(PEFT, tmp_path / "out", dialect=dialect)
    same(read_adapter(PEFT), read_adapter(written))
    again = convert_adapter(PEFT, tmp_path / "out", dialect=dialect)  # an existing folder is written into
    assert (again.is_dir(), len(list((tmp_path / "out").iterdir()))) == (
        dialect == "peft",
        2 if dialect == "peft" else 1,
    )


def test_a_folder_is_converted_file_by_file_and_bad_ones_are_reported(tmp_path):
    source = tmp_path / "in"
    for name in ("a", "deep/b"):
        write_adapter(read_adapter(PEFT), source / f"{name}.safetensors", dialect="diffusers")
    (source / "bad.safetensors").write_bytes(b"nothing")
    run = CliRunner().invoke(
        cli.app, ["convert", str(source), "--dialect", "kohya", "--output", str(tmp_path / "out"), "--json"]
    )
    found = {Path(one["source"]).name: one["error"] for one in json.loads(run.stdout)["files"]}
    assert isinstance(run.exception, FileError)
    assert found["a.safetensors"] is None
    assert found["b.safetensors"] is None
    assert "7 bytes long" in found["bad.safetensors"]
    written = sorted(
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert written == ["a.safetensors", "deep/b.safetensors"]
    same(read_adapter(PEFT), read_adapter(tmp_path / "out" / "deep" / "b.safetensors"))


def test_the_command_converts_one_and_says_where(tmp_path):
    output = tmp_path / "x.safetensors"
    run = CliRunner().invoke(
        cli.app, ["convert", str(PEFT), "--dialect", "kohya", "--output", str(output), "--dtype", "float16"]
    )
    whole = "read whole by whoever reads its base, which is none we know"
    assert (run.exit_code, run.stdout.strip()) == (0, f"{output}: 12 layers, rank 16, 0.03 MB, kohya layout; {whole}")
    assert set(inspect_file(output).dtypes) == {"F16"}
    same(read_adapter(PEFT), read_adapter(output), atol=1e-2)


@pytest.mark.parametrize(
    ("options", "error", "phrase"),
    [
        ({"dtype": "float7"}, ConfigError, "no dtype 'float7'"),
        ({"dialect": "klingon"}, DialectError, r"no dialect 'klingon' to write; known: diffusers, [^o][^;]*$"),
        ({"dialect": "omi"}, DialectError, "no dialect 'omi' to write; known: diffusers, "),
        ({"output": "y.bin"}, FileError, "pickles are not written"),
        ({"dialect": "peft", "output": "x.safetensors"}, FileError, "name a folder"),
        ({"dtype": "float8_e5m2", "scaled": 1e12}, AdapterError, "do not fit"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(tmp_path, options, error, phrase):
    options = dict(options)
    adapter = read_adapter(PEFT).scaled(options.pop("scaled", 1.0))
    source = write_adapter(adapter, tmp_path / "in" / "x.safetensors")
    output = tmp_path / "out" / options.pop("output", "y.safetensors" if options.get("dialect") != "peft" else "y")
    with pytest.raises(error, match=phrase):
        convert_adapter(source, output, **options)
    assert not (tmp_path / "out").exists()


def test_a_source_is_not_overwritten_by_its_conversion(tmp_path):
    path = write_adapter(read_adapter(PEFT), tmp_path / "x.safetensors")
    with pytest.raises(FileError, match="write somewhere else"):
        convert_adapter(path, path, dialect="kohya")
    assert read_adapter(path).layers


def test_one_names_several_files_are_told_apart_and_stop_nobody(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    for name, scale in (("cat", 1.0), ("style", 2.0)):
        write_adapter(read_adapter(PEFT).scaled(scale), source / f"{name}.safetensors")
    torch.save(load_file(source / "style.safetensors"), source / "cat.pt")
    run = CliRunner().invoke(cli.app, ["convert", str(source), "--output", str(output)])
    assert run.exit_code == 0, run.output
    assert sorted(path.name for path in output.iterdir()) == [
        "cat.pt.safetensors",
        "cat.safetensors",
        "style.safetensors",
    ]
    same(read_adapter(output / "cat.pt.safetensors"), read_adapter(output / "style.safetensors"))
    same(read_adapter(output / "cat.safetensors"), read_adapter(PEFT))


@pytest.mark.parametrize("name", ["out.bin", "out.safetensors"])
def test_several_adapters_do_not_go_into_a_folder_that_is_named_as_a_file(tmp_path, name):
    sources = [str(write_adapter(read_adapter(PEFT), tmp_path / f"{i}.safetensors")) for i in "ab"]
    run = CliRunner().invoke(cli.app, ["convert", *sources, "--output", str(tmp_path / name)])
    assert isinstance(run.exception, FileError)
    assert "several adapters are written into a folder" in str(run.exception)
    assert not (tmp_path / name).exists()


def scaled(adapter, weight_of):
    return Adapter({name: layer.scaled(weight_of(name)) for name, layer in adapter.layers.items()})


def test_a_reference_s_weights_go_into_the_file(tmp_path):
    both = {"text_encoder": 0.5, "unet": -2.0}
    layer = LowRank(torch.randn(2, 320), torch.randn(320, 2))
    unet = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": layer}
    adapter = Adapter(dict(read_adapter(PEFT).layers) | unet)
    source = write_adapter(adapter, tmp_path / "in.safetensors")
    for dialect in ("diffusers", "kohya"):
        output = tmp_path / f"{dialect}.safetensors"
        convert_adapter(f"{source}:0.5", output, dialect=dialect)
        same(read_adapter(output), adapter.scaled(0.5), atol=1e-6)
        convert_adapter(f"{source}:text_encoder=0.5,unet=-2", output, dialect=dialect)
        same(read_adapter(output), scaled(adapter, lambda name: both[name.partition(".")[0]]), atol=1e-6)
    folder, (one, other) = tmp_path / "out", (tmp_path / "one.safetensors", tmp_path / "other.safetensors")
    for path in (one, other):
        write_adapter(read_adapter(PEFT), path)
    run = CliRunner().invoke(cli.app, ["convert", f"{one}:0.25", str(other), "--output", str(folder)])
    assert run.exit_code == 0, run.output
    same(read_adapter(folder / one.name), read_adapter(PEFT).scaled(0.25), atol=1e-6)
    same(read_adapter(folder / other.name), read_adapter(PEFT))
    alone = CliRunner().invoke(cli.app, ["convert", f"{one}:-1", "--output", str(tmp_path / "minus.safetensors")])
    assert alone.exit_code == 0, alone.output
    same(read_adapter(tmp_path / "minus.safetensors"), read_adapter(PEFT).scaled(-1))


@pytest.mark.parametrize(
    ("tail", "phrase"), [(":0.5[0-0.4]", "a window needs the denoising steps"), (":unet=0.5", "no layer is covered")]
)
def test_what_a_file_cannot_hold_of_a_reference_is_refused(tmp_path, tail, phrase):
    source = write_adapter(read_adapter(PEFT), tmp_path / "in.safetensors")
    with pytest.raises(ConfigError, match=phrase):
        convert_adapter(f"{source}{tail}", tmp_path / "out.safetensors")
    run = CliRunner().invoke(cli.app, ["convert", f"{source}{tail}", "--output", str(tmp_path / "out")])
    assert phrase in run.output + str(run.exception)
    assert run.exit_code != 0
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_files_that_would_become_one_are_named_and_the_others_are_written(tmp_path):
    for name in ("a/x", "b/x", "b/y"):
        write_adapter(read_adapter(PEFT), tmp_path / f"{name}.safetensors")
    output = tmp_path / "out"
    done = list(convert_all(plan_conversions([tmp_path / "a", tmp_path / "b"], output, "kohya"), dialect="kohya"))
    errors = {str(one.source.relative_to(tmp_path)): one.error for one in done}
    both = f"{tmp_path / 'a/x.safetensors'} and {tmp_path / 'b/x.safetensors'}"
    assert errors["b/y.safetensors"] is None
    for name in ("a/x.safetensors", "b/x.safetensors"):
        assert errors[name] == f"{both} would become one file, {output / 'x.safetensors'}; convert them apart"
    assert [path.name for path in output.iterdir()] == ["y.safetensors"]


def test_the_file_of_a_folder_is_found_in_the_published_order(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    order = ["pytorch_model.bin"]
    for name in ("adapter_model.bin", "pytorch_lora_weights.bin"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
        order.append(name)
    for name in ("some.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        write_adapter(read_adapter(PEFT), tmp_path / name)
        order.append(name)
    for name in reversed(order):
        assert pick_file(tmp_path).name == name
        (tmp_path / name).unlink()
    with pytest.raises(RefError, match="holds no adapter file; it holds nothing"):
        pick_file(tmp_path)


def test_several_candidates_are_refused_and_listed(tmp_path):
    for name in ("a", "b"):
        write_adapter(read_adapter(PEFT), tmp_path / f"{name}.safetensors")
    save_file({"conv_in.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RefError, match=r"holds 2 adapters, a\.safetensors, b\.safetensors"):
        pick_file(tmp_path)
    assert [bundle.path.name for bundle in find_bundles(tmp_path)] == [
        "a.safetensors",
        "b.safetensors",
        "model.safetensors",
    ]


def test_a_trainers_companions_are_no_candidates(tmp_path):
    for name in ("pytorch_model.bin", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", ".hidden.bin"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
    assert [bundle.path.name for bundle in find_bundles(tmp_path)] == ["pytorch_model.bin"]


def test_nothing_of_a_name_says_the_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match=r"'me/x@v1' is no file or folder here, and as a Hub id: .*HF_HUB_OFFLINE"):
        find_bundle("me/x@v1:0.5")
    with pytest.raises(RefError, match="no catalogue name"):
        find_bundle("nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefError, match="holds no tensor file"):
        find_bundles("empty")


def test_a_pickle_from_a_hub_cache_needs_permission(tmp_path):
    folder = tmp_path / "models--me--x" / "snapshots" / "abc"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(PEFT)
    with pytest.raises(FileError, match="allow_pickle=True"):
        read_adapter(folder)
    same(read_adapter(PEFT), read_adapter(folder, allow_pickle=True))


def test_a_killed_or_failing_peft_writer_leaves_no_half_folder(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise FileError("the disk is full")

    monkeypatch.setattr("texforce_hub.hub.peft_folder.write_stream", fail)
    adapter = read_adapter(PEFT)
    for folder in (tmp_path / "new", tmp_path / "old"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(FileError, match="disk is full"):
            write_adapter(adapter, folder, dialect="peft")
        assert sorted(tmp_path.rglob("*")) == before
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old" / "adapter_config.json").write_text("{}")
    assert (tmp_path / "old" / "adapter_config.json").read_text() == "{}"


ENTRY = 'title = "T"\nfamily = "shapes"\nlicense = "Apache-2.0"\n'


def test_catalogue_entries_are_read_and_checked(tmp_path):
    (tmp_path / "colour.toml").write_text(ENTRY + 'folder = "shapes/colour"\nparts = ["text_encoder"]\n')
    entry = read_catalog(tmp_path)["colour"]
    assert (entry.folder, entry.parts, entry.kind) == (
        (tmp_path / "shapes/colour").resolve(),
        ("text_encoder",),
        "adapter",
    )
    with pytest.raises(TypeError):
        read_catalog(tmp_path)["other"] = entry


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        (ENTRY + 'foldr = "x"', "did you mean 'folder'"),
        (ENTRY, "a folder or a repo"),
        ('folder = "x"', "lacks title, family, license"),
        (ENTRY + 'folder = "../x"', "outside the catalogue"),
        (ENTRY + 'repo = "a/b"\nrevision = "main"', "a full commit"),
        (ENTRY + 'folder = "x"\nkind = "song"', "kind 'song'"),
        (ENTRY + 'folder = "x"\nsha256 = "12"', "64 hexadecimal digits"),
        ("= 1", "catalogue entry"),
    ],
)
def test_a_wrong_catalogue_entry_is_one_line(tmp_path, text, phrase):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ConfigError, match=phrase):
        read_catalog(tmp_path)


def test_a_catalogue_name_is_its_folder(tmp_path, monkeypatch):
    write_adapter(read_adapter(PEFT), tmp_path / "shipped", dialect="diffusers")
    entries = {
        "here": CatalogEntry("here", "T", "shapes", "x", folder=tmp_path / "shipped"),
        "lost": CatalogEntry("lost", "T", "shapes", "x", folder=tmp_path / "nowhere"),
        "away": CatalogEntry("away", "T", "sd1", "x", repo="me/x", revision="0" * 40),
    }
    monkeypatch.setattr("texforce_hub.hub.catalog._read_catalog", lambda _: entries)
    same(read_adapter("here:0.3"), read_adapter(PEFT))
    with pytest.raises(HubError, match=r"me/x@0000.*HF_HUB_OFFLINE is set"):
        read_adapter("away")
    with pytest.raises(RefError, match="not in this installation"):
        read_adapter("lost")


def test_what_was_written_is_said_with_those_who_read_all_of_it(tmp_path):
    def written(*arguments):
        return CliRunner().invoke(cli.app, [*map(str, arguments), "--force"]).stdout.splitlines()

    norm = "text_encoder.text_model.encoder.layers.0.layer_norm1"
    norms = Adapter({f"{norm}.{end}": Vector(torch.randn(768)) for end in ("weight", "bias")})
    file = write_adapter(norms, tmp_path / "norms.safetensors", dialect="kohya")
    for dialect, readers in {"kohya": ["A1111"], "comfy": ["ComfyUI"]}.items():
        lines = written("convert", file, "-o", tmp_path / "x.safetensors", "--dialect", dialect, "--json")
        assert json.loads("\n".join(lines))["files"][0]["readers"] == readers
    query = "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"
    t5 = Adapter({query: LowRank(torch.randn(2, 4096), torch.randn(4096, 2))})
    file = write_adapter(t5, tmp_path / "t5.safetensors", dialect="kohya")
    merged = tmp_path / "merged.safetensors"
    lines = written("merge", f"{file}:0.5", "-o", merged)
    assert f"{merged}: 1 layer, rank 2, 0.07 MB, diffusers layout; read whole by texforce-hub only" in lines
    assert written("merge", f"{file}:0.5", "-o", merged, "-q") == [str(merged)]
