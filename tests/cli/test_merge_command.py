"""The commands of merging."""

import json
import logging
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.support.merging import Q0, write_files
from texforce_hub.adapter.value import Adapter
from texforce_hub.cli import app, merge_methods
from texforce_hub.cli.merge_methods import METHODS as LISTED
from texforce_hub.errors import MergeError, RecipeError
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.methods.listing import LAWS, render_markdown, render_module
from texforce_hub.merge.methods.registry import METHODS


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands_merge_verify_resize_compare_and_refuse(files, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    out = tmp_path / "m.safetensors"
    done = run("merge", f"{files[0]}:0.7", f"{files[1]}:-0.3", "--rank", 4, "--output", out, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["layers"][0]["rank"] == 4
    assert "kept" in run("merge", files[0], "--output", tmp_path / "n.safetensors").stdout
    assert run("verify", out).exit_code == 0
    again = tmp_path / "again.safetensors"
    assert run("merge", "--recipe", out, "--output", again).exit_code == 0
    assert torch.equal(read_adapter(again).delta(Q0), read_adapter(out).delta(Q0))
    plan = run("merge", *files, "--dry-run", "--json", "--output", tmp_path / "no.safetensors")
    assert json.loads(plan.stdout)["ranks"][Q0] == 4
    assert not (tmp_path / "no.safetensors").exists()
    small = run("resize", out, "--rank", 1, "--output", tmp_path / "s.safetensors", "--json")
    assert json.loads(small.stdout)["layers"][0]["after"] == 1
    picture = tmp_path / "h.png"
    alike = run("compare", files[0], out, "--json", "--output", picture)
    assert json.loads(alike.stdout)["cosine"] > 0.5
    assert picture.read_bytes().startswith(b"\x89PNG")
    for arguments in (
        ("merge", *files, "--output", out, "--method", "linear"),
        ("merge", *files),
        ("merge", *files, "--output", files[1]),
        ("merge", "--recipe", out, "--output", files[0]),
        ("merge", "--output", out),
        ("merge", *files, "--recipe", out, "--output", out),
        ("merge", "--recipe", out, "--rank", 2, "--output", again),
        ("merge", "--recipe", out, "--method", "svd", "--output", again),
        ("merge", "--recipe", out, "--seed", 0, "--output", again),
        ("merge", *files, "--option", "density", "--method", "ties", "--output", out),
    ):
        assert isinstance(run(*arguments).exception, (MergeError, RecipeError)), arguments


def test_verify_exits_with_one_when_the_answer_is_no(files, tmp_path):
    merged = merge_adapters([(files[0], 1.0)]).adapter
    path = write_adapter(Adapter(merged.scaled(1.5).layers, merged.metadata), tmp_path / "x.safetensors")
    done = run("verify", path)
    assert done.exit_code == 1
    assert "DIFFERS" in done.stdout


def test_the_table_behind_help_is_the_registry_written_down(tmp_path):
    written = Path(str(merge_methods.__file__)).read_text("utf-8")
    assert written == render_module(), (
        "run python -m texforce_hub.merge.methods.listing > texforce_hub/cli/merge_methods.py"
    )
    assert list(LISTED) == list(METHODS)
    assert all(set(LISTED[name][1]) == set(method.options) for name, method in METHODS.items())
    listed = json.loads(run("merge", "--list-methods", "--json").stdout)
    assert set(listed) == set(METHODS)


def test_the_markdown_table_shows_every_method_and_its_laws():
    rows = render_markdown().splitlines()
    assert len(rows) == 2 + len(METHODS)
    for row, method in zip(rows[2:], METHODS.values()):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0] == f"`{method.name}`"
        assert {law for law, cell in zip(LAWS, cells[2:]) if cell == "✓"} == method.laws
