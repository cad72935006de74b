"""Adapters named inside prompts: read as A1111 reads them, found by their names, each image as its own tags say."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from tests.support.pipelines_tiny import random_adapter
from texforce_hub import read_tags
from texforce_hub.adapter.value import Adapter
from texforce_hub.cli import app
from texforce_hub.errors import PromptError, RecipeError, RefError, TexForceHubError
from texforce_hub.files.writing import write_tensors
from texforce_hub.generate.draw import DrawSettings
from texforce_hub.generate.images.png import read_png_text
from texforce_hub.generate.prompts.adapter_index import AdapterIndex
from texforce_hub.generate.prompts.sets import held_out_prompts
from texforce_hub.generate.prompts.tags import PromptTag, TaggedPrompt
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.write import write_adapter
from texforce_hub.pipelines.load import load_pipeline

names = st.text("ab é.,-_/0(", min_size=1, max_size=8).filter(lambda text: text.strip() == text)
weights = st.floats(allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1).map(lambda share: round(share, 6))
windows = (
    st.tuples(shares, shares)
    .map(sorted)
    .filter(lambda w: w != [0, 1])
    .map(lambda w: AdapterRef("a", window=(w[0], w[1])))
)
ramps = st.lists(st.tuples(shares, weights), min_size=1, max_size=3).map(
    lambda points: AdapterRef("a", ramp=tuple(sorted(points, key=lambda point: point[0])))
)
tags = (
    st.builds(PromptTag, names, weights, weights)
    | st.builds(PromptTag, names, weights, weights, windows.map(lambda ref: ref.schedule))
    | st.builds(PromptTag, names, schedule=ramps.map(lambda ref: ref.schedule))
)


@settings(deadline=None, max_examples=200)
@given(st.text("a ,.():", max_size=12).map(lambda text: " ".join(text.split())), st.lists(tags, min_size=1, max_size=3))
def test_writing_and_reading_tags_are_inverse(text, found):
    assert all(PromptTag.parse(str(tag)) == tag for tag in found)
    prompt = TaggedPrompt(text, tuple(found))
    assert TaggedPrompt.parse(str(prompt)) == prompt


@pytest.mark.parametrize(
    ("tag", "name", "text_encoder", "unet"),
    [
        ("<lora:x>", "x", 1, 1),
        ("<lora:x:0.8>", "x", 0.8, 0.8),
        ("<lora:x:0.5:0.9>", "x", 0.5, 0.9),
        ("<lora:x:-0.5>", "x", -0.5, -0.5),
        ("<lora:x:te=0.5:unet=1>", "x", 0.5, 1),
        ("<lora:x:te=0.5>", "x", 0.5, 0.5),
        ("<lora:x:unet=0.2>", "x", 1, 0.2),
        ("<lora:x:0.5:te=0.25>", "x", 0.25, 0.25),
        ("<lora:x:0.5:0.9:te=0.25>", "x", 0.25, 0.9),
        ("<lora: my style, v2 : 0.5 >", "my style, v2", 0.5, 0.5),
        ("<lyco:sub/x.safetensors:1e-1>", "sub/x.safetensors", 0.1, 0.1),
    ],
)
def test_a_tag_means_what_a1111_takes_it_for(tag, name, text_encoder, unet):
    assert PromptTag.parse(tag) == PromptTag(name, text_encoder, unet)


def test_a_prompt_keeps_its_words_and_loses_its_tags():
    found = TaggedPrompt.parse("a <lora:x:1> lime, circle<lyco:y:0.5>s")
    assert found.text == "a lime, circles"
    assert [tag.name for tag in found.tags] == ["x", "y"]
    untouched = "two  blanks, a < b and 1 <3"
    assert TaggedPrompt.parse(untouched) == TaggedPrompt(untouched)


@pytest.mark.parametrize(
    ("prompt", "caret", "message"),
    [
        ("a <lora:x:0.5", 2, "not closed"),
        ("a <lora>", 2, "not a tag"),
        ("<lora x:1>", 0, "not a tag"),
        ("<lora::1>", 6, "no adapter's name"),
        ("<lora:a=b:1>", 6, "no adapter's name"),
        ("<lora:x:>", 8, "is not a number"),
        ("<lora:x:much>", 8, "is not a number"),
        ("<lora:x:1e999>", 8, "too large"),
        ("<lora:x:1:2:4>", 12, "resize"),
        ("<lora:x:dyn=4>", 8, "resize"),
        ("<lora:x:lbw=ALL>", 8, "'lbw' is nothing that a tag says"),
        ("<lora:x:te=1:te=2>", 13, "stands twice"),
        ("<hypernet:x:1>", 1, "no 'hypernet' tag"),
        ("<LORA:x:1>", 1, "no 'LORA' tag"),
    ],
)
def test_a_bad_tag_is_shown_with_a_caret(prompt, caret, message):
    with pytest.raises(RefError, match=message) as error:
        TaggedPrompt.parse(prompt)
    assert str(error.value).splitlines()[-1] == " " * (2 + caret) + "^"


def test_a_tag_that_cannot_be_written_cannot_be_made():
    for name in ("", " x", "a:b", "a>b", "a=b"):
        with pytest.raises(RefError, match="cannot stand in a tag"):
            PromptTag(name)
    with pytest.raises(RefError, match="not finite"):
        PromptTag("x", math.inf)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("shapes", device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pipe):
    """A folder of adapters as a user has one: files, folders, trainers' names, a broken one."""
    home = tmp_path_factory.mktemp("loras")
    write_adapter(random_adapter(pipe, seed=1, size=0.3), home / "words.safetensors")
    write_adapter(random_adapter(pipe, seed=2, size=0.3), home / "sub" / "more words")
    write_adapter(random_adapter(pipe, seed=3, parts=["unet"], size=0.3), home / "paint.safetensors")
    both = Adapter({**random_adapter(pipe, seed=4).layers, **random_adapter(pipe, seed=5, parts=["unet"]).layers})
    write_adapter(both, home / "both.safetensors")
    for place, title in (("e1", "titled"), ("e2", "twice"), ("e3", "twice"), ("e4", "words")):
        adapter = random_adapter(pipe, seed=6, size=0.3)
        tensors = {f"{name}.lora_A.weight": layer.down for name, layer in adapter.layers.items()}
        tensors |= {f"{name}.lora_B.weight": layer.up for name, layer in adapter.layers.items()}
        write_tensors(home / f"{place}.safetensors", tensors, {"ss_output_name": title})
    for place in ("halves", "."):  # cloneofsimo's two halves: alone in a folder, and beside others
        for half, parts in (("pair.text_encoder.pt", ["text_encoder"]), ("pair.pt", ["unet"])):
            (home / place).mkdir(exist_ok=True)
            layers = random_adapter(pipe, seed=7, parts=parts).layers
            state = {f"{name}.lora_A.weight": layer.down for name, layer in layers.items()}
            state |= {f"{name}.lora_B.weight": layer.up for name, layer in layers.items()}
            torch.save(state, home / place / half)
    (home / "sub" / "again.safetensors").write_bytes((home / "words.safetensors").read_bytes())
    (home / "again.safetensors").write_bytes((home / "words.safetensors").read_bytes())
    (home / "broken.safetensors").write_bytes(b"nothing")
    return home


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("words", "words.safetensors"),  # though another file has this title
        ("words.safetensors", "words.safetensors"),
        ("more words", "sub/more words"),
        ("sub/more words", "sub/more words"),
        ("sub\\again", "sub/again.safetensors"),
        ("titled", "e1.safetensors"),
        ("halves/pair", "halves"),
        ("./again", "again.safetensors"),
    ],
)
def test_a_name_is_a_file_a_path_a_folder_or_a_title(folder, name, file):
    assert Path(AdapterIndex(folder).find(PromptTag(name)).source) == folder / file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("again", "could mean 2 adapters.*: ./again.safetensors, ./sub/again.safetensors; write the path"),
        ("./pair", "one adapter in several files"),
        ("pair", "could mean 2 adapters.*: ./halves/pair.pt, ./pair.pt"),
        ("twice", "could mean 2 adapters.*: ./e2.safetensors, ./e3.safetensors"),
        ("Wrods", "the nearest: words"),
        ("broken", "broken.safetensors"),
        ("0", "no adapter '0'"),
    ],
)
def test_a_name_with_no_file_or_several_is_refused(folder, name, message):
    with pytest.raises(TexForceHubError, match=message):
        AdapterIndex(folder).find(PromptTag(name))


def test_a_part_takes_the_weight_that_its_tag_has_for_it(folder, caplog):
    text, stack = read_tags("a circle <lora:both:0.5:0.9>", folder)
    assert text == "a circle"
    assert dict(stack[0].parts) == {"text_encoder": 0.5, "unet": 0.9}
    assert not caplog.records
    assert read_tags("x <lora:words:0.5:0.9>", folder)[1][0].weight == 0.5
    assert "the weight 0.9 acts on nothing" in caplog.text
    caplog.clear()
    assert read_tags("x <lora:paint:0.5:0.9>", folder)[1][0].weight == 0.9
    assert "the weight 0.5 acts on nothing" in caplog.text
    caplog.clear()
    assert read_tags("x <lora:words:0.5>", folder)[1][0] == AdapterRef(str(folder / "words.safetensors"), weight=0.5)
    assert not caplog.records


def test_without_a_folder_names_are_the_catalogues():
    assert read_tags("x <lora:shapes-colour:0.8>") == ("x", [AdapterRef("shapes-colour", weight=0.8)])
    assert read_tags("no tag") == ("no tag", [])
    with pytest.raises(RefError, match=r"the nearest: shapes-colour.*--adapter-dir"):
        read_tags("<lora:shapes-color:1>")
    with pytest.raises(RefError, match="no folder of adapters"):
        read_tags("x", "/nowhere/at/all")


def run(*arguments):
    return CliRunner().invoke(app, ["apply", "--device", "cpu", "--inference-steps", "2", *map(str, arguments)])


def done(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def pixels(path):
    return torch.tensor(list(Image.open(path).tobytes())).int()


def alike(first, second):
    return bool((pixels(first) - pixels(second)).abs().max() <= 1)


def origin(path) -> Any:
    return json.loads(read_png_text(path)["texforce_hub"])


@pytest.mark.parametrize("fused", [[], ["--mode", "fuse"]], ids=["attach", "fuse"])
def test_each_image_is_made_as_its_own_tags_say(folder, tmp_path, fused):
    given = {
        "a red circle": [],
        "a red circle <lora:words:0.8>": ["--adapter", f"{folder / 'words.safetensors'}:0.8"],
        "a red <lora:both:-1:0.5> circle": ["--adapter", f"{folder / 'both.safetensors'}:text_encoder=-1,unet=0.5"],
        "a red circle <lora:words:0.8> ": ["--adapter", f"{folder / 'words.safetensors'}:0.8"],
        "a red circle <lora:paint:0.7><lora:titled:0.2>": [
            *("--adapter", f"{folder / 'paint.safetensors'}:0.7"),
            *("--adapter", f"{folder / 'e1.safetensors'}:0.2"),
        ],
    }
    (tmp_path / "prompts.txt").write_text("\n".join(given), encoding="utf-8")
    done("--prompts", tmp_path / "prompts.txt", "--adapter-dir", folder, "--output", tmp_path / "tags", *fused)
    for number, stack in enumerate(given.values()):
        if number == 3:  # the stack of number 1 again
            continue
        done("--prompt", "a red circle", *stack, "--output", tmp_path / str(number), *(fused if stack else []))
        alone = tmp_path / str(number) / ("stack" if stack else "base") / "0000.png"
        assert alike(tmp_path / "tags" / "stack" / f"{number:04d}.png", alone), number
        assert alike(tmp_path / "tags" / "base" / f"{number:04d}.png", tmp_path / "0" / "base" / "0000.png")
    images = [pixels(tmp_path / "tags" / "stack" / f"000{number}.png") for number in range(5)]
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images[1], images[3])


def test_what_a_tag_asked_for_is_in_the_picture_and_a_recipe_replays_it(folder, tmp_path):
    prompts = ["--prompt", "a lime circle <lora:both:0.5:0.9>", "--prompt", "a red circle"]
    done(
        *(*prompts, "--adapter", f"{folder / 'words.safetensors'}:0.5", "--adapter-dir", folder),
        *("--output", tmp_path / "out", "--save-recipe", tmp_path / "r.toml"),
    )
    first = tmp_path / "out" / "stack" / "0000.png"
    assert read_png_text(first)["parameters"].startswith("a lime circle <lora:both:0.5:0.9> <lora:words:0.5>\n")
    (tag,) = origin(first)["tags"]
    assert tag["adapter"] == f"{folder / 'both.safetensors'}:text_encoder=0.5,unet=0.9"
    assert len(tag["sha256"]) == 64
    assert "tags" not in origin(tmp_path / "out" / "base" / "0000.png")
    assert "tags" not in origin(tmp_path / "out" / "stack" / "0001.png")
    done_again = CliRunner().invoke(app, ["apply", "--recipe", f"{tmp_path}/r.toml", "--output", f"{tmp_path}/again"])
    assert done_again.exit_code == 0, done_again.exception
    made = {p.relative_to(tmp_path / "out"): p.read_bytes() for p in (tmp_path / "out").rglob("*.png")}
    assert made == {p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*.png")}
    assert len(made) == 5
    recipe = (tmp_path / "r.toml").read_text()
    for wrong, message in (("prompt = 7", "an adapter for prompt 7"), ("prompt = 1", "tags")):
        (tmp_path / "bad.toml").write_text(recipe.replace("prompt = 0", wrong))
        found = CliRunner().invoke(app, ["apply", "--recipe", f"{tmp_path}/bad.toml", "--output", f"{tmp_path}/x"])
        assert isinstance(found.exception, RecipeError)
        assert message in str(found.exception)


def test_tags_act_in_every_column_but_the_base(folder, tmp_path):
    prompt, words = "a red circle <lora:titled:0.5>", f"a={folder / 'words.safetensors'}"
    for how in (["--each"], ["--sweep", "a=0:1:2"]):
        out = tmp_path / how[0].strip("-")
        done("--prompt", prompt, "--adapter", words, "--adapter-dir", folder, *how, "--output", out)
    done("--prompt", prompt, "--adapter-dir", folder, "--output", tmp_path / "alone")
    assert alike(tmp_path / "sweep" / "a=0" / "0000.png", tmp_path / "alone" / "stack" / "0000.png")
    assert alike(tmp_path / "sweep" / "a=1" / "0000.png", tmp_path / "each" / "a" / "0000.png")
    assert not alike(tmp_path / "each" / "base" / "0000.png", tmp_path / "alone" / "stack" / "0000.png")


def test_weights_and_long_prompts_reach_the_pictures(tmp_path, folder):
    long = "a red circle on the left of a blue square. a big green circle above it. a lime square"
    prompts = ["--prompt", "a (red:1.6) circle <lora:words:0.5>", "--prompt", "a red circle <lora:words:0.5>"]
    done(*prompts, "--adapter-dir", folder, "--output", tmp_path / "on", "--save-recipe", tmp_path / "r.toml")
    assert not alike(tmp_path / "on" / "stack" / "0000.png", tmp_path / "on" / "stack" / "0001.png")
    assert 'prompt_weights = "auto"' in (tmp_path / "r.toml").read_text()
    done("--prompt", long, "--output", tmp_path / "cut")
    done("--prompt", long, "--long-prompts", "--output", tmp_path / "whole")
    assert not alike(tmp_path / "cut" / "base" / "0000.png", tmp_path / "whole" / "base" / "0000.png")
    assert origin(tmp_path / "whole" / "base" / "0000.png")["settings"]["long_prompts"] is True


def test_a_line_is_said_once_however_many_columns_it_concerns(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="texforce_hub")
    long = "a red circle on the left of a blue square, a big green circle above it"
    done("--prompt", long, "--adapter", "shapes-colour", "--output", tmp_path / "out")
    assert sum("not read" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a <lora:nowhere:1>", "--output", "o"], "no adapter 'nowhere' in the catalogue"),
        (["--prompt", "a <lora:x", "--output", "o"], "not closed"),
        (["--prompt", "<lora:shapes-colour>", "--output", "o"], "tags alone"),
        (["--prompt", "a", "--negative-prompt", "b <lora:x:1>", "--output", "o"], "no tag acts in a negative prompt"),
        (["--prompt", "a <lora:shapes-colour>", "--save-pipeline", "p"], "a tag acts on its own"),
        (["--prompt", "a <lora:shapes-colour>", "--each", "--output", "o"], "give --adapter"),
        (["--prompt", "a", "--adapter-dir", "nowhere", "--output", "o"], "no folder of adapters"),
        (["--prompt", "a", "--prompt-weights", "maybe", "--output", "o"], "expected one of auto, on, off"),
        (["--prompt", "(a", "--prompt-weights", "on", "--output", "o"], "is not closed"),
        (["--recipe", "r.toml", "--adapter-dir", "x", "--output", "o"], "--adapter-dir beside --recipe"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments) if "--recipe" not in arguments else CliRunner().invoke(app, ["apply", *arguments])
    assert isinstance(result.exception, TexForceHubError), result.output
    assert message in str(result.exception)
    assert not (tmp_path / "o").exists()


def test_layers_that_clip_skip_leaves_out_are_said_for_tags_too(tmp_path, folder, caplog):
    done("--prompt", "a red circle <lora:words>", "--adapter-dir", folder, "--clip-skip", 1, "--output", tmp_path / "o")
    assert "does not reach the image" in caplog.text


def test_an_adapter_is_read_once_however_many_prompts_ask_for_it(tmp_path, folder, monkeypatch):
    from texforce_hub.generate import run as drawing

    read: list[str] = []
    original = drawing.read_adapter

    def note(ref):
        read.append(ref.source)
        return original(ref)

    monkeypatch.setattr(drawing, "read_adapter", note)
    prompts = [word for weight in (0.5, 0.6, 0.5) for word in ("--prompt", f"a red circle <lora:words:{weight}>")]
    done(*prompts, "--adapter-dir", folder, "--output", tmp_path / "o")
    assert read == [str(folder / "words.safetensors")]


def test_prompts_for_training_and_evaluation_have_no_tags_and_no_weights(tmp_path):
    for text, message in (("a <lora:x:1>", "tags are for apply"), ("a (b:1.2)", "which only apply reads")):
        (tmp_path / "p.txt").write_text(text, encoding="utf-8")
        with pytest.raises(PromptError, match=message):
            held_out_prompts(str(tmp_path / "p.txt"))


def test_a_setting_with_a_tag_in_its_negative_prompt_cannot_be_made():
    with pytest.raises(PromptError, match="below 0 in the prompt"):
        DrawSettings(("a",), negative_prompt="<lora:x:1>")


@pytest.mark.parametrize(
    ("tag", "weights"),
    [
        ("<lora:shapes-colour:1:start=0:end=0.25>", [1, 0, 0, 0]),
        ("<lora:shapes-colour:0.5:start=0.5>", [0, 0, 0.5, 0.5]),
        ("<lora:shapes-colour:0@0,1@0.5>", [0, 0.5, 1, 1]),
        ("<lora:shapes-colour:0.2@0.2,1@0.2>", [0.2, 1, 1, 1]),
        ("<lora:shapes-colour:0.8>", [0.8] * 4),
    ],
)
def test_a_tag_says_when_its_adapter_acts(tag, weights):
    _, (ref,) = read_tags(f"a lime disc {tag}")
    assert [ref.at(step / 4).weight for step in range(4)] == pytest.approx(weights)


@pytest.mark.parametrize(
    "tag",
    [
        "<lora:x:1:start=0.5:end=0.2>",
        "<lora:x:1:end=1.5>",
        "<lora:x:1@0:0.5>",
        "<lora:x:0.5:1@0>",
        "<lora:x:1@0:te=0.5>",
        "<lora:x:1:start=0:start=0.1>",
        "<lora:x:1@2>",
    ],
)
def test_a_tag_that_says_no_time_is_refused_with_a_caret(tag):
    with pytest.raises(RefError, match=r"\^"):
        PromptTag.parse(tag)


def test_prompts_with_timed_tags_are_drawn_each_under_its_own(tmp_path):
    run = ["apply", "--base", "shapes", "--inference-steps", "2", "--device", "cpu", "--output", str(tmp_path / "x")]
    for tag in ("<lora:shapes-colour:1:end=0>", "<lora:shapes-colour:1:end=0.5>"):
        run += ["--prompt", f"a lime circle {tag}"]
    result = CliRunner().invoke(app, run)
    assert result.exit_code == 0, result.output
    base, stack = (
        [Image.open(p).tobytes() for p in sorted((tmp_path / "x" / name).iterdir())] for name in ("base", "stack")
    )
    assert stack[0] == base[0]
    assert stack[1] != base[1]
