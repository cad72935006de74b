"""The first tasks of a new user, one after the other, on random weights and the shipped base."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from texforce_hub import apply_adapter, load_pipeline, read_adapter
from texforce_hub.cli import app

TEXT = "lora_te_text_model_encoder_layers_{}_self_attn_{}_proj"
UNET = "lora_unet_down_blocks_{}_attentions_0_transformer_blocks_0_attn2_to_{}"
DRAW = ["--inference-steps", "1", "--device", "cpu"]


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (arguments, result.output, result.exception)
    return result.stdout


def write_lora(path: Path, *, text: bool, unet: bool, seed: int, width: int = 768, rank: int = 4):
    """A LoRA in kohya's layout with random numbers, of a text encoder and of a U-Net of SD1's width."""
    generator = torch.Generator().manual_seed(seed)
    names = [TEXT.format(i, p) for i in range(12) for p in "qv"] if text else []
    names += [UNET.format(i, p) for i in (0, 1) for p in "kv"] if unet else []
    tensors = {}
    for name in names:
        inside, outside = (768, 320 * (1 + int("blocks_1" in name))) if "unet" in name else (width, width)
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, inside, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(outside, rank, generator=generator) * 0.01
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """A folder of forty LoRAs, every fourth of which changes a text encoder."""
    folder = tmp_path_factory.mktemp("first") / "loras"
    folder.mkdir()
    for number in range(40):
        write_lora(folder / f"style {number:02d}.safetensors", text=number % 4 == 0, unet=True, seed=number)
    return folder


def test_1_which_of_forty_loras_touch_the_text_encoder(loras):
    found = json.loads(run("inspect", loras, "--part", "text_encoder", "--json", "--no-hash"))["files"]
    assert [Path(file["path"]).stem for file in found] == [f"style {number:02d}" for number in range(0, 40, 4)]
    assert "10 files" in run("inspect", loras, "--part", "text_encoder", "--no-hash")


def test_2_do_they_fit_my_base(loras):
    assert run("check", loras / "style 00.safetensors", "--base", "sd1").startswith("fits")
    assert "sdxl" in run("check", loras / "style 00.safetensors", "--base", "sdxl", "-q", status=1).lower()


def draw(pipe):
    noise = torch.Generator().manual_seed(0)
    return pipe("a lime disc", num_inference_steps=1, output_type="pt", generator=noise).images


def test_3_two_at_seven_and_three_tenths_and_undo():
    pipe = load_pipeline("shapes", device="cpu")
    before = {name: weight.clone() for name, weight in pipe.text_encoder.state_dict().items()}
    with apply_adapter(pipe, [("shapes-colour", 0.7), ("shapes-shape", 0.3)]):
        inside = pipe(
            "a lime disc", num_inference_steps=1, output_type="pt", generator=torch.Generator().manual_seed(0)
        )
    outside = pipe("a lime disc", num_inference_steps=1, output_type="pt", generator=torch.Generator().manual_seed(0))
    assert not torch.equal(inside.images, outside.images)
    after = pipe.text_encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_4_three_merged_to_rank_32_for_a1111(loras, tmp_path):
    three = [
        f"{loras / f'style {number:02d}.safetensors'}:{weight}" for number, weight in ((0, 0.7), (4, 0.3), (8, 0.5))
    ]
    said = run("merge", *three, "--rank", 32, "--dialect", "a1111", "-o", tmp_path / "three.safetensors")
    assert "kohya layout" in said
    assert said.splitlines()[-1].startswith("kept 100")
    assert run("verify", tmp_path / "three.safetensors").startswith("same")


def test_5_smaller_and_half_precision(loras, tmp_path):
    file = loras / "style 00.safetensors"
    assert "rank 2" in run("resize", file, "--rank", 2, "-o", tmp_path / "small.safetensors")
    run("convert", file, "--dtype", "fp16", "--dialect", "comfyui", "-o", tmp_path / "half.safetensors")
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * file.stat().st_size


def test_6_how_alike_are_two(loras, tmp_path):
    pair = [loras / "style 00.safetensors", loras / "style 04.safetensors"]
    said = run("compare", *pair, "-o", tmp_path / "alike.png")
    assert said.splitlines()[-1] == str(tmp_path / "alike.png")
    assert Image.open(tmp_path / "alike.png").width < 2000


def test_7_a_grid_of_weights_and_seeds(tmp_path):
    sweeps = ["--sweep", "shapes-colour=0:1:3", "--sweep", "seed=0,1"]
    run("apply", "--adapter", "shapes-colour", "--prompt", "a lime disc", *sweeps, *DRAW, "-o", tmp_path / "grid")
    assert len(list((tmp_path / "grid").rglob("0000.png"))) == 6


def test_8_a_recipe_is_replayed_to_the_byte(tmp_path):
    asked = ["--adapter", "shapes-colour:0.8", "--prompt", "a lime disc <lora:shapes-shape:0.4>"]
    run("apply", *asked, *DRAW, "-o", tmp_path / "a", "--save-recipe", tmp_path / "r.toml")
    run("apply", "--recipe", tmp_path / "r.toml", "--device", "cpu", "-o", tmp_path / "b")
    first, again = (
        {p.relative_to(d): p.read_bytes() for p in d.rglob("*.png")} for d in (tmp_path / "a", tmp_path / "b")
    )
    assert first == again


def test_9_my_own_reward_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def redness(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    Path("p.txt").write_bytes("\ufeffa red disc\n# no prompt\n".encode())
    asked = ["--adapter", "shapes-colour", "--reward", "python:./mine.py:redness", "--prompts", "p.txt", "--seeds", "1"]
    result = json.loads(run("evaluate", *asked, *DRAW, "--json"))
    assert result["prompts"] == [{"text": "a red disc", "group": "held-out"}]
    assert [reward["name"] for reward in result["rewards"]] == ["python:./mine.py:redness"]


def test_10_the_result_as_a_pipeline_that_diffusers_loads(tmp_path):
    from diffusers import StableDiffusionPipeline

    run("apply", "--adapter", "shapes-colour", "--save-pipeline", tmp_path / "p", "--device", "cpu")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "p", safety_checker=None)
    base = load_pipeline("shapes", device="cpu")
    name = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    saved, plain = (
        {k.removeprefix("text_model."): v for k, v in p.text_encoder.state_dict().items()} for p in (pipe, base)
    )
    assert not torch.equal(saved[name.removeprefix("text_model.")], plain[name.removeprefix("text_model.")])


def test_11_a_file_that_is_none_is_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.safetensors", "w") as archive:
        archive.writestr("readme.txt", "no adapter")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "x.safetensors")])
    assert result.exit_code != 0
    assert "x.safetensors" in f"{result.output} {result.exception}"


def test_12_from_a_folder_to_one_layout_and_back(loras, tmp_path):
    some = [loras / f"style {number:02d}.safetensors" for number in (0, 4)]
    assert "2 adapters written" in run("convert", *some, "-o", tmp_path / "tidy")
    first = read_adapter(some[0])
    again = read_adapter(tmp_path / "tidy" / "style 00.safetensors")
    assert first.layers.keys() == again.layers.keys()
    assert all(torch.allclose(first.delta(name), again.delta(name), atol=1e-6) for name in first.layers)
