"""Grids of up to three axes, folders that hold one run, and what pictures say of how they were made."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from texforce_hub.cli import app
from texforce_hub.errors import ConfigError, FileError
from texforce_hub.files.hashing import hash_tensors
from texforce_hub.generate.axes import Axis, points, read_axes, read_axis
from texforce_hub.generate.draw import DrawSettings
from texforce_hub.generate.images.png import read_png_text
from texforce_hub.generate.recipe import DrawRun, replay_run
from texforce_hub.generate.run import Drawing
from texforce_hub.hub.catalog import read_catalog
from texforce_hub.hub.refs.adapter import AdapterRef

STACK = ["--adapter", "shapes-colour", "--prompt", "a lime circle", "--inference-steps", 2, "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(app, ["apply", *map(str, arguments)])


def folders(path: Path):
    return {picture.parent.name for picture in path.rglob("0000.png")}


def test_two_sweeps_make_a_grid_of_both(tmp_path):
    result = run(*STACK, "--sweep", "shapes-colour=0:1:3", "--sweep", "seed=3,4", "-o", tmp_path / "g")
    assert result.exit_code == 0, result.output
    weights = ("0", "0.5", "1")
    assert folders(tmp_path / "g") == {f"shapes-colour={w}_seed={s}" for w in weights for s in (3, 4)}
    first = tmp_path / "g" / "shapes-colour=0.5_seed=4" / "0000.png"
    alone = run(*STACK[:4], "--seed", 4, *STACK[4:], "--sweep", "shapes-colour=0.5,1", "-o", tmp_path / "a")
    assert alone.exit_code == 0, alone.output
    assert Image.open(first).tobytes() == Image.open(tmp_path / "a" / "shapes-colour=0.5" / "0000.png").tobytes()
    assert "Seed: 4" in read_png_text(first)["parameters"]


def test_three_axes_are_a_sheet_for_every_value_of_the_third(tmp_path):
    axes = ["--sweep", "guidance=1,5", "--sweep", "steps=1,2", "--sweep", "prompt=lime,red"]
    result = run(*STACK, *axes, "-o", tmp_path / "g", "--save-recipe", tmp_path / "r.toml")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "g").glob("sheet*")) == ["sheet-lime.png", "sheet-red.png"]
    drawn = {path.parent.name: read_png_text(path)["parameters"] for path in (tmp_path / "g").rglob("0000.png")}
    assert len(drawn) == 8
    assert drawn["guidance=5_steps=1_red"].startswith("a red circle <lora:shapes-colour:1>\nSteps: 1,")
    assert replay_run(tmp_path / "r.toml").sweeps == ("guidance=1,5", "steps=1,2", "prompt=lime,red")


def test_columns_of_one_sampling_share_their_batches(monkeypatch):
    from texforce_hub.generate import draw

    calls, sample = [], draw.sample

    def counted(pipe, settings, seeds, given, **options):
        calls.append(len(seeds))
        return sample(pipe, settings, seeds, given, **options)

    monkeypatch.setattr(draw, "sample", counted)
    settings = DrawSettings(("a red circle",), inference_steps=1, batch_size=50)

    adapters = (AdapterRef("shapes-colour"),)
    drawing = Drawing(
        DrawRun("shapes", adapters, settings, sweeps=("shapes-colour=0:1:4", "guidance=2,5", "seed=0:2:3"))
    )
    drawing.load(device="cpu")
    assert (drawing.count, drawing.steps) == (24, 24)
    drawing._draw_columns(lambda _count: None)
    assert calls == [12, 12]  # one batch a guidance


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["a=0:1:100000000"], "at most 1,000"),
        (["seed=0:999:1000", "a=0,1"], "2,000 pictures"),
        (["a=0,1", "a=2,3"], "swept twice"),
        (["a=0,1", "seed=0,1", "steps=1,2", "guidance=1,2"], "at most 3"),
        (["seed=0:1:3"], "no whole number"),
        (["seed=-1,2"], "no whole number"),
        (["scheduler=ddim,magic"], "no scheduler"),
        (["a=nan,1"], "expected NAME="),
        (["a=1"], "expected NAME="),
        (["a"], "expected NAME="),
    ],
)
def test_an_axis_that_cannot_be_is_named(sweeps, message):
    with pytest.raises(ConfigError, match=message):
        read_axes(sweeps)


def test_axes_are_read_as_they_are_written():
    assert read_axis("sampler=euler_a,DDIM") == Axis("scheduler", ("euler-a", "ddim"))
    assert read_axis("cfg=1:3:3") == Axis("guidance", (1.0, 2.0, 3.0))
    assert points([Axis("a", (1, 2)), Axis("b", (3, 4))]) == [(1, 3), (2, 3), (1, 4), (2, 4)]


def test_a_folder_holds_one_run_and_force_replaces_it_whole(tmp_path):
    folder = tmp_path / "run"
    assert run(*STACK, "--each", "-o", folder).exit_code == 0
    (folder / "mine.txt").write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused = run(*STACK, "-o", folder)
    assert isinstance(refused.exception, FileError)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert run(*STACK, "-o", folder, "--force").exit_code == 0
    assert folders(folder) == {"base", "stack"}
    assert (folder / "mine.txt").read_text() == "mine"


def test_a_list_of_files_that_points_elsewhere_deletes_nothing(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other.png"
    assert run(*STACK, "-o", folder).exit_code == 0
    other.write_bytes(b"mine")
    (folder / "files.json").write_text(json.dumps({"files": ["../other.png", str(other), "files.json", 3]}))
    assert run(*STACK, "-o", folder, "--force").exit_code == 0
    assert other.read_bytes() == b"mine"


def test_a_picture_names_its_adapters_and_model_as_a1111_does(tmp_path):
    prompt = "a lime circle <lora:shapes-shape:0.4>"
    result = run("--adapter", "shapes-colour:0.8", "--prompt", prompt, "--inference-steps", 1, "-o", tmp_path / "o")
    assert result.exit_code == 0, result.output
    text = read_png_text(tmp_path / "o" / "stack" / "0000.png")["parameters"]
    assert text.startswith(f"{prompt} <lora:shapes-colour:0.8>\n")
    hashes = {}
    for name in ("shapes-colour", "shapes-shape"):
        (file,) = read_catalog()[name].folder.glob("*.safetensors")
        hashes[name] = hash_tensors(file)[:12]
    assert f'Lora hashes: "shapes-colour: {hashes["shapes-colour"]}, shapes-shape: {hashes["shapes-shape"]}"' in text
    assert "Model: shapes" in text
    assert "lora" not in read_png_text(tmp_path / "o" / "base" / "0000.png")["parameters"].partition("\n")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip-skip", 100], "text_encoder has 3 layers"),
        (["--num-images", 10**12], ""),
        (["--seed", 10**25], ""),
        (["--unet", "/dev/null"], "/dev/null"),
        (["--sweep", "shapes-colour=0:1:100000000"], "at most 1,000"),
        (["--scheduler", "magic"], "no scheduler"),
        (["--width", 10**9], "expected a whole number"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*STACK, *arguments, "-o", "out")
    assert result.exit_code != 0
    assert message in f"{result.exception} {result.output}"
    assert isinstance(result.exception, SystemExit | ConfigError) or type(result.exception).__name__.endswith("Error")
    assert not isinstance(result.exception, OverflowError | MemoryError | TypeError | RuntimeError)
    assert list(tmp_path.iterdir()) == []
