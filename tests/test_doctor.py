"""doctor: what it finds, what it advises, and the secret that it never shows."""

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from texforce_hub import cli, doctor
from texforce_hub.errors import PipelineError

SECRET = "hf_abcdefghijklmnopqrstuvwxyz012345"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of our own."""
    place = tmp_path / "cache"
    monkeypatch.setattr(doctor.constants, "HF_HUB_CACHE", str(place))
    return place


def pipeline_folder(folder, parts=("unet", "vae")):
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
    index |= {part: ["diffusers", "Model"] for part in parts}
    for part in parts:
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def findings():
    """All of it once, with a token that is there: it looks at real libraries, which takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        return list(doctor.examine(device="cpu"))


@pytest.fixture
def examined(findings, monkeypatch):
    """The command, given what was found already; gives the bases and the device that it was asked about."""
    asked = []

    def examine(bases, *, device):
        asked.append((bases, device))
        return iter([*findings, *map(doctor.examine_base, bases)])

    monkeypatch.setattr(doctor, "examine", examine)
    return asked


def test_every_subject_is_looked_at_and_the_token_is_in_no_output(findings, examined):
    names = {one.name for one in findings}
    wanted = {"python", "torch", "diffusers", "transformers", "torchvision", "device", "bfloat16", "cache", "room"}
    assert wanted | {"endpoint", "token", "base shapes", "vocabulary", "extra prompt"} <= names
    assert next(one.found for one in findings if one.name == "token").startswith("present")
    data, table = (CliRunner().invoke(cli.app, ["doctor", "--device", "cpu", *more]) for more in (["--json"], []))
    assert examined == [([], "cpu")] * 2
    assert [one["name"] for one in json.loads(data.stdout)["findings"]] == [one.name for one in findings]
    for shown in (data.output, table.output):
        assert "token" in shown
        assert SECRET[:10] not in shown


def test_the_extras_are_those_of_the_package_and_each_says_what_it_is_for():
    project = tomllib.loads((Path(doctor.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    offered = {name: needs for name, needs in project["optional-dependencies"].items() if name != "dev"}
    assert {name: [Requirement(need).name for need in needs] for name, needs in offered.items()} == {
        name: [package] for name, (package, _) in doctor.EXTRAS.items()
    }
    there = doctor._examine_extra("some", "pytest", "testing")
    assert (there.state, there.found.startswith("pytest "), "for testing" in there.found) == ("ok", True, True)
    missing = doctor._examine_extra("some", "no-such-package", "nothing")
    assert (missing.state, "texforce-hub[some]" in missing.advice) == ("ok", True)


def test_a_vocabulary_that_is_missing_comes_with_the_package_that_has_it(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "find_vocabulary", lambda: tmp_path / "vocabulary.gz")
    assert doctor.examine_vocabulary().found == str(tmp_path / "vocabulary.gz")

    def fail():
        raise PipelineError("none")

    monkeypatch.setattr(doctor, "find_vocabulary", fail)
    found = doctor.examine_vocabulary()
    assert (found.state, "open_clip_torch" in found.advice) == ("note", True)


def test_an_absent_token_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "get_token", lambda: None)
    assert "hf auth login" in doctor.examine_token().found


def test_a_base_that_cannot_be_found_offline_is_a_problem_with_its_way_out(cache, monkeypatch):
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", True)
    offline = doctor.examine_base("somebody/some-base")
    assert (offline.state, "hf download somebody/some-base" in offline.advice) == ("problem", True)
    assert "HF_HUB_OFFLINE" in doctor.examine_endpoint().advice
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", False)
    assert doctor.examine_base("somebody/some-base").state == "note"
    assert doctor.examine_endpoint().state == "ok"


def test_a_problem_makes_the_answer_no(examined, tmp_path):
    run = CliRunner().invoke(cli.app, ["doctor", "--device", "cpu", "--base", str(tmp_path / "nowhere"), "--json"])
    assert run.exit_code == 1
    assert json.loads(run.stdout)["problems"] >= 1


def test_bases_on_disk_are_whole_or_not(tmp_path):
    whole = pipeline_folder(tmp_path / "whole")
    assert doctor.examine_base(str(whole)).state == "ok"
    (whole / "unet" / "config.json").unlink()
    assert "lacks unet" in doctor.examine_base(str(whole)).found
    (whole / "model_index.json").write_text("{")
    assert doctor.examine_base(str(whole)).state == "problem"
    (tmp_path / "empty").mkdir()
    assert "no model_index.json" in doctor.examine_base(str(tmp_path / "empty")).found
    (tmp_path / "one.safetensors").write_bytes(b"x")
    assert doctor.examine_base(str(tmp_path / "one.safetensors")).state == "ok"
    assert doctor.examine_base("shapes").state == "ok"


def test_a_base_in_the_cache_is_found(cache, tmp_path, monkeypatch):
    folder = pipeline_folder(tmp_path / "snapshot")
    monkeypatch.setattr(doctor, "try_to_load_from_cache", lambda repo, file: str(folder / file))
    assert doctor.examine_base("me/x").state == "ok"


@pytest.mark.parametrize(
    ("code", "state", "part"),
    [("", "ok", "0.1"), ("raise RuntimeError('operator torchvision::nms does not exist')", "problem", "nms")],
)
def test_a_torchvision_that_cannot_be_imported_is_a_problem(tmp_path, monkeypatch, code, state, part):
    (tmp_path / "torchvision.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1")
    found = doctor.examine_torchvision()
    assert (found.state, part in found.found) == (state, True)
    assert bool(found.advice) == (state == "problem")


def test_a_library_outside_its_range_or_missing_is_said(monkeypatch):
    assert doctor._examine_library("pytest", Requirement("pytest<1")).state == "note"
    assert doctor._examine_library("pytest", Requirement("pytest>1")).state == "ok"
    missing = doctor._examine_library("no-such-library", Requirement("no-such-library>1"))
    assert (missing.state, missing.advice) == ("problem", "pip install 'no-such-library>1'")
    monkeypatch.setattr(doctor.metadata, "version", _not_found)
    assert next(one for one in doctor.examine_versions() if one.name == "torch").state == "problem"


def _not_found(name):
    raise metadata.PackageNotFoundError(name)


def test_a_device_that_is_not_there_is_a_problem():
    (found,) = doctor.examine_device("xpu:7")
    assert (found.state, "--device cpu" in found.advice) == ("problem", True)


def test_the_cache_and_its_size(cache, monkeypatch):
    none, _ = doctor.examine_cache()
    assert none.found.endswith("none yet")
    blob = cache / "models--me--x" / "blobs" / "abc"
    snapshot = cache / "models--me--x" / "snapshots" / ("0" * 40)
    for folder in (blob.parent, snapshot, cache / "models--me--x" / "refs"):
        folder.mkdir(parents=True)
    blob.write_bytes(b"x" * 20_000_000)
    (snapshot / "file").symlink_to(blob)
    found, room = doctor.examine_cache()
    assert found.found.endswith("1 repositories, 0.02 GB")
    (cache / "models--me--broken").mkdir()
    assert "damaged" in next(doctor.examine_cache()).advice
    monkeypatch.setattr(doctor, "_TIGHT", 10**18)
    assert doctor._examine_room(cache).state == "note"
    assert room.name == "room"


def test_nothing_heavy_is_imported_for_help():
    code = "import sys, texforce_hub.cli.doctor; print(int('torch' in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert run.stdout.strip() == "0"
