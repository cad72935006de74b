"""Every example runs, and shows what it says."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.pipelines_tiny import random_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.pipelines.load import load_pipeline

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    pipe = load_pipeline("shapes", device="cpu")
    return [str(write_adapter(random_adapter(pipe, seed=s, size=0.2), folder / f"a{s}")) for s in (1, 2)]


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SHEETS = {"01_apply": 3, "02_stack": 3, "03_finetuned_unet": 4, "04_many_adapters": 4, "07_schedule": 8}


@pytest.mark.parametrize(("name", "columns"), SHEETS.items())
def test_an_example_draws_its_sheet(name, columns, adapters, tmp_path, capsys):
    unet = ("shapes-refl",) if name.startswith("03") else ()
    sheet = load_example(name).main(adapters, *unet, tmp_path / "out")
    assert Image.open(sheet).width > columns * 96
    if name == "04_many_adapters":
        assert "8 images under 4 stacks: 15 U-Net calls" in capsys.readouterr().out


def test_a_schedule_moves_pictures_less_than_the_whole_adapter(tmp_path, capsys):
    load_example("07_schedule").main(["shapes-colour", "shapes-shape"], tmp_path / "out")
    lines = [line.split(":") for line in capsys.readouterr().out.splitlines()]
    moved = {name: float(rest.split()[0]) for name, rest in lines}
    assert moved["late"] < moved["early"] < moved["always"]
    assert min(moved.values()) > 0


def test_an_evaluation_says_what_helps_and_writes_its_figures(tmp_path, capsys):
    figures = load_example("05_evaluate").main(["shapes-colour"], tmp_path / "out", prompts=12, steps=8)
    assert re.search(r"shapes-colour: \+0\.\d+ .* on 12 prompts, better on \d+%: helps", capsys.readouterr().out)
    assert json.loads(figures.read_text())["prompts"] == 12


def test_a_tuned_stack_is_printed_with_what_it_is_worth(tmp_path, capsys):
    stack = load_example("06_tune").main(
        ["shapes-colour", "shapes-shape"], tmp_path / "out", prompts=4, generations=2, steps=2
    )
    printed = capsys.readouterr().out
    assert "generation 2: best" in printed
    assert "minus equal, held out: " in printed
    assert re.fullmatch(r"shapes-colour:[\d.]+ \+ shapes-shape:[\d.]+\n", stack.read_text())


def test_every_numbered_example_is_run():
    assert [p.stem for p in sorted(EXAMPLES.glob("0*.py"))] == sorted([*SHEETS, "05_evaluate", "06_tune"])


def test_a_full_unet_is_written_as_refl_does_and_loads(tmp_path):
    folder = load_example("make_tuned_unet").main("full", tmp_path / "refl", steps=2)
    assert folder == tmp_path / "refl" / "checkpoint-2" / "unet"
    tuned, base = load_pipeline("shapes", unet=str(folder.parent), device="cpu").unet, load_pipeline("shapes").unet
    moved = [not torch.equal(a, b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_a_unet_lora_is_written_as_dpok_does_and_loads(tmp_path):
    path = load_example("make_tuned_unet").main("lora", tmp_path / "dpok", steps=2)
    names = list(torch.load(path, weights_only=True))
    assert all(".processor.to_" in name and "_lora." in name for name in names)
    tuned, base = load_pipeline("shapes", unet=str(path), device="cpu").unet, load_pipeline("shapes").unet
    moved = sum(not torch.equal(a, b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True))
    assert moved == len(names) // 2
