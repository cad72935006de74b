"""A tree of folders: each real folder is walked once, what cannot be looked into is named, nothing is written over."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from texforce_hub import cli
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import FileError
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.find import find_bundles
from texforce_hub.hub.inspect import inspect_file
from texforce_hub.hub.measure import measure_file
from texforce_hub.hub.write import write_adapter

STEM = "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
BLOCK = "text_encoder.text_model.encoder.layers.0"


def tensors(value=1.0):
    return {f"{STEM}.lora_down.weight": torch.ones(1, 96), f"{STEM}.lora_up.weight": torch.full((96, 1), value)}


def make(path, value=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors(value), path)
    return path


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))


def test_a_linked_folder_is_walked_and_a_link_back_does_not_loop(tmp_path):
    make(tmp_path / "loras" / "own" / "cat.safetensors")
    make(tmp_path / "drive" / "ink.safetensors")
    (tmp_path / "loras" / "a-link").symlink_to(tmp_path / "drive")
    (tmp_path / "loras" / "again").symlink_to(tmp_path / "drive")
    (tmp_path / "loras" / "own" / "back").symlink_to(tmp_path / "loras")
    (tmp_path / "loras" / "a-own").symlink_to(tmp_path / "loras" / "own")  # its own name stays
    found = [bundle.path.relative_to(tmp_path).as_posix() for bundle in find_bundles(tmp_path / "loras")]
    assert found == ["loras/a-link/ink.safetensors", "loras/own/cat.safetensors"]


def test_a_folder_that_cannot_be_looked_into_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, caplog):
    make(tmp_path / "lost+found" / "x.safetensors")
    make(tmp_path / "cat.safetensors")
    listed = Path.iterdir

    def refuse(path):
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert [bundle.path.name for bundle in find_bundles(tmp_path)] == ["cat.safetensors"]
    assert "lost+found: cannot be looked into, and is left out: Permission denied" in caplog.text
    with pytest.raises(FileError, match="cannot be looked into: Permission denied"):
        find_bundles(tmp_path / "lost+found")
    assert run("inspect", tmp_path, "--no-hash").exit_code == 0


def test_a_folder_with_one_adapter_is_converted_as_one_with_many(tmp_path):
    make(tmp_path / "nested" / "style" / "ink.safetensors")
    assert run("convert", tmp_path / "nested", "--output", tmp_path / "tidy").exit_code == 0
    assert names(tmp_path / "tidy") == ["style/ink.safetensors"]


def test_a_second_folder_is_not_written_over_the_first(tmp_path):
    for index, folder in enumerate(("cats", "dogs"), 2):
        make(tmp_path / folder / "pytorch_lora_weights.safetensors", float(index))
        assert run("convert", tmp_path / folder, "--output", tmp_path / "tidy", "--dialect", "kohya").exit_code == 0
    assert names(tmp_path / "tidy") == ["cats.safetensors", "dogs.safetensors"]
    make(tmp_path / "other" / "cats.safetensors", 9.0)
    again = run("convert", tmp_path / "other", "--output", tmp_path / "tidy", "--json")
    (entry,) = json.loads(again.stdout)["files"]
    assert "cats.safetensors exists; name another folder, or give --force" in entry["error"]
    assert float(load_file(tmp_path / "tidy" / "cats.safetensors")[f"{STEM}.lora_up.weight"].max()) == 2.0
    assert run("convert", tmp_path / "other", "--output", tmp_path / "tidy", "--force").exit_code == 0


@pytest.mark.parametrize("name", ["水" * 100, "x" * 300])
def test_a_name_that_no_file_system_takes_is_refused_in_one_line(tmp_path, name):
    file = make(tmp_path / "x.safetensors")
    with pytest.raises(FileError, match=r"a name of .* bytes; file systems take 255"):
        convert_adapter(file, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileError, match="file systems take 255"):
        write_adapter(Adapter({f"{BLOCK}.mlp.fc1": LowRank(torch.ones(1, 8), torch.ones(8, 1))}), tmp_path / name)
    for command in (("convert", file, "--output", tmp_path / name), ("check", file, "--base", name)):
        assert isinstance(run(*command).exception, FileError)


def test_a_name_as_long_as_they_take_has_sidecars_too_long_to_be(tmp_path):
    file = make(tmp_path / f"{'x' * 243}.safetensors")
    assert inspect_file(file).sidecars == ()


HUGE = torch.full((96, 2), 3e38)
ODD = {
    "huge": {f"{STEM}.lora_down.weight": HUGE.T.contiguous(), f"{STEM}.lora_up.weight": HUGE},
    "huge products": {
        f"{STEM}.hada_w1_a": HUGE,
        f"{STEM}.hada_w1_b": HUGE.T.contiguous(),
        f"{STEM}.hada_w2_a": HUGE.double(),
        f"{STEM}.hada_w2_b": HUGE.T.contiguous(),
    },
    "a core of another dtype": {
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": torch.ones(2, 4, 1, 1),
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight": torch.ones(2, 2, 3, 3, dtype=torch.float64),
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": torch.ones(4, 2, 1, 1),
    },
    "factors of two dtypes": {
        f"{STEM}.lokr_w1_a": torch.ones(8, 2),
        f"{STEM}.lokr_w1_b": torch.ones(2, 8, dtype=torch.float64),
        f"{STEM}.lokr_w2": torch.ones(12, 12),
    },
}


@pytest.mark.parametrize("case", ODD)
def test_huge_and_mixed_numbers_are_measured_and_converted(tmp_path, case):
    save_file(ODD[case], tmp_path / "odd.safetensors")
    (facts,) = measure_file(tmp_path / "odd.safetensors")
    assert facts.norm is not None
    assert 0 < facts.norm < float("inf")
    for dialect in ("peft", "kohya"):
        done = run("convert", tmp_path / "odd.safetensors", "--dialect", dialect, "--output", tmp_path / dialect)
        assert done.exit_code == 0 or isinstance(done.exception, FileError), done.exception
