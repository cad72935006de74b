"""The order of a listing: parts as in the pipeline, numbers by their value, in tables and in JSON alike."""

import json

import pytest
import torch
from typer.testing import CliRunner

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.cli import app
from texforce_hub.hub.write import write_adapter

NAMES = [
    f"{part}.text_model.encoder.layers.{block}.self_attn.q_proj"
    for part in ("text_encoder", "text_encoder_2")
    for block in (2, 10)
]


@pytest.fixture
def file(tmp_path):
    layers = {name: LowRank(torch.randn(2, width), torch.randn(width, 2)) for name in reversed(NAMES) for width in [
        768 if name.startswith("text_encoder.") else 1280
    ]}  # fmt: skip
    return str(write_adapter(Adapter(layers), tmp_path / "two.safetensors"))


def listed(*arguments):
    run = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert run.exit_code in (0, 1), run.output
    return json.loads(run.stdout)


def test_json_lists_layers_in_natural_order_everywhere(file, tmp_path):
    (inspected,) = listed("inspect", file, "--weights")["files"]
    assert list(inspected["parts"]) == ["text_encoder", "text_encoder_2"]
    listings = {
        "inspect": inspected["weights"],
        "merge": listed("merge", f"{file}:1", f"{file}:0.5", "-o", tmp_path / "m.safetensors")["layers"],
        "resize": listed("resize", file, "--rank", 1, "-o", tmp_path / "r.safetensors")["layers"],
        "compare": listed("compare", file, file)["layers"],
    }
    for command, layers in listings.items():
        assert [layer["name"] for layer in layers] == NAMES, command
    assert list(listed("merge", f"{file}:1", "--dry-run")["ranks"]) == NAMES
    assert listed("check", file, "--base", "sdxl")["matched"] == NAMES


def test_inspect_of_a_part_filters_files_and_layers_and_ends_with_totals(file, tmp_path):
    other = Adapter({f"{NAMES[0]}": LowRank(torch.randn(2, 768), torch.randn(768, 2))})
    write_adapter(other, tmp_path / "one.safetensors")
    (only,) = listed("inspect", file, "--weights", "--part", "text_encoder_2")["files"]
    assert [layer["name"] for layer in only["weights"]] == NAMES[2:]
    run = CliRunner().invoke(app, ["inspect", file, "--part", "text_encoder_2"])
    assert run.stdout.splitlines()[-1] == "text_encoder_2: 2 of 4 layers"
    run = CliRunner().invoke(app, ["inspect", str(tmp_path), "--part", "text_encoder"])
    assert run.stdout.splitlines()[-1].startswith("2 files, ")
    assert "2 change a text encoder" in run.stdout
    assert [f["path"] for f in listed("inspect", tmp_path, "--part", "text_encoder_2")["files"]] == [file]
