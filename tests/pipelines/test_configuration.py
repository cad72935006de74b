"""A base folder's damaged configuration is one line that names file and key, whatever the libraries raise."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.support.pipelines_saved import load, saved, tuned_unet
from texforce_hub.cli.doctor.bases import examine_base
from texforce_hub.errors import FileError, PipelineError, TexForceHubError
from texforce_hub.shapes import WEIGHTS

FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
    "tokenizer/tokenizer_config.json",
]
VALUES = [None, 0, -1, 5, 2**31, 0.5, "", "x", "\x1b[2J", [], [1], ["x", None], {}, {"a": 1}, True, "/dev/zero"]
TEXTS = ["5", "[]", "{}", "null", "{", "", '"x"', "1e999", "\x00", "[" * 100_000]


@pytest.fixture
def base(tmp_path):
    """A copy of the embedded base that may be damaged."""
    shutil.copytree(WEIGHTS, tmp_path / "base")
    for path in (tmp_path / "base").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path / "base"


def mutations():
    """Every key of every configuration file with every value, dropped, and every file with every text."""
    for file in FILES:
        for key, good in json.loads((WEIGHTS / file).read_text()).items():
            inside = [[value, *good[1:]] for value in (1, None, "x", [])] if isinstance(good, list) else []
            yield from ((file, key, value) for value in [*VALUES, *inside, "dropped"])
        yield from ((file, None, text) for text in TEXTS)


def damaged(text, key, value):
    if key is None:
        return value
    config = json.loads(text)
    return json.dumps({k: v for k, v in config.items() if k != key} if value == "dropped" else {**config, key: value})


def try_mutation(base, file, key, value):
    """``loads``, or ``refused`` in one line that names the file and, where one has a wrong value, the key."""
    text = (base / file).read_text()
    (base / file).write_text(damaged(text, key, value))
    said = ""
    try:
        load(base)
    except TexForceHubError as error:
        said = str(error)
    finally:
        (base / file).write_text(text)
    if not said:
        return "loads"
    wanted = [Path(file).name, *([] if key is None or value == "dropped" else [key])]
    assert said.isprintable(), (file, key, value, said)
    assert all(word in said for word in wanted), (file, key, value, said)
    return "refused"


def try_mutations(base, chosen):
    return Counter(try_mutation(base, *mutation) for mutation in chosen)


def test_damaged_values_of_all_keys_are_refused_by_name_or_load(base):
    outcomes = try_mutations(base, random.Random(3).sample(list(mutations()), 40))
    assert outcomes["refused"] > 10


@pytest.mark.campaign
def test_every_damaged_value_of_every_key_is_refused_by_name_or_loads(base):
    outcomes = try_mutations(base, mutations())
    assert outcomes["refused"] > 1000


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("model_index.json", "_class_name", "dropped"),
        ("model_index.json", "_class_name", "Nope"),
        ("model_index.json", "_class_name", "Any"),
        ("model_index.json", "unet", [1, 2]),
        ("model_index.json", "unet", 3),
        ("model_index.json", "unet", ["\x1b[2J", "x"]),
        ("model_index.json", "unet", ["os", "system"]),
        ("model_index.json", "text_encoder", ["..", "CLIPTextModel"]),
        ("model_index.json", "vae", "dropped"),
        ("text_encoder/config.json", None, "5"),
        ("text_encoder/config.json", "pad_token_id", [1]),
        ("text_encoder/config.json", "num_hidden_layers", 10**9),
        ("text_encoder/config.json", "num_hidden_layers", 4),
        ("text_encoder/config.json", "vocab_size", 10**12),
        ("unet/config.json", "in_channels", 5),
        ("unet/config.json", "num_class_embeds", 5),
        ("unet/config.json", "layers_per_block", 10**9),
        ("unet/config.json", "_diffusers_version", 0.5),
        ("vae/config.json", "down_block_types", [1]),
        ("scheduler/scheduler_config.json", "trained_betas", {"a": 1}),
        ("tokenizer/tokenizer_config.json", "eos_token", ["x", None]),
    ],
)
def test_a_damaged_value_is_named_with_its_file(file, key, value, base):
    assert try_mutation(base, file, key, value) == "refused"


@pytest.mark.parametrize("text", ["{", "", "5", "{}", '{"version": "1.0", "model": {"type": "None"}}', "\0"])
def test_a_damaged_tokenizer_file_is_named_and_no_other(text, base):
    (base / "tokenizer" / "tokenizer.json").write_text(text)
    with pytest.raises(PipelineError, match=r"tokenizer/tokenizer\.json: ") as caught:
        load(base)
    assert "tokenizer_config.json" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_vocabulary_is_named(text, base):
    (base / "tokenizer" / "tokenizer.json").unlink()
    (base / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (base / "tokenizer" / "vocab.json").write_text(text)
    with pytest.raises(PipelineError, match=r"tokenizer/vocab\.json: "):
        load(base)


def test_a_pipe_in_a_base_is_refused_before_it_is_read(base):
    for file in ("unet/config.json", "model_index.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        text = (base / file).read_text()
        (base / file).unlink()
        os.mkfifo(base / file)
        with pytest.raises(TexForceHubError, match=r"pipe, a socket or a device"):
            load(base)
        if file == "model_index.json":
            assert examine_base(str(base)).state == "problem"
        (base / file).unlink()
        (base / file).write_text(text)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "pipe"])
def test_what_is_no_regular_file_is_no_base_and_no_unet(path, tmp_path):
    if path == "pipe":
        path = str(tmp_path / "pipe")
        os.mkfifo(path)
    for given in ({"base": path}, {"base": "shapes", "unet": path}):
        with pytest.raises(FileError, match="a device; expected a file"):
            load(**given)
    assert examine_base(path).state == "problem"


def test_a_tuned_unets_damaged_configuration_is_named(shelf, tmp_path):
    tuned_unet().save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet" / "config.json"
    config = json.loads(file.read_text())
    for value in (None, [1], "\x1b[2J", 10**12):
        file.write_text(json.dumps({**config, "block_out_channels": value}))
        with pytest.raises(PipelineError, match="block_out_channels") as caught:
            load(saved(shelf), unet=tmp_path / "unet")
        assert str(caught.value).isprintable()


def test_a_damaged_index_of_shards_is_a_finding_of_the_doctor(base):
    for text in TEXTS:
        (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
        finding = examine_base(str(base))
        assert finding.state == "problem"
        assert "index.json" in finding.found
