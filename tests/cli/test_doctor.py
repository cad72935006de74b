"""doctor: what it finds, what it advises, and the secret that it never shows."""

import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from packaging.requirements import Requirement
from safetensors.numpy import save_file
from typer.testing import CliRunner

from texforce_hub import cli
from texforce_hub.cli import doctor
from texforce_hub.cli.doctor import cache as cache_module
from texforce_hub.cli.doctor import imports, libraries
from texforce_hub.cli.doctor.cache import examine_cache, examine_endpoint, examine_token
from texforce_hub.cli.doctor.device import examine_device
from texforce_hub.cli.doctor.imports import Attempt, try_imports
from texforce_hub.cli.doctor.libraries import examine_extra, examine_library, examine_torchvision, examine_vocabulary
from texforce_hub.cli.doctor.online import examine_online
from texforce_hub.errors import ConfigError, PipelineError

SECRET = "hf_abcdefghijklmnopqrstuvwxyz012345"
ROOT = Path(doctor.__file__).parents[3]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of our own."""
    place = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    return place


PARTS = {
    "unet": ("UNet2DConditionModel", {"config.json": "{}", "diffusion_pytorch_model.safetensors": None}),
    "tokenizer": ("CLIPTokenizer", {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": "{}"}),
    "scheduler": ("DDIMScheduler", {"scheduler_config.json": "{}"}),
    "feature_extractor": ("CLIPImageProcessor", {"preprocessor_config.json": "{}"}),
}


def pipeline_folder(folder):
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
    for part, (kind, files) in PARTS.items():
        index[part] = ["diffusers", kind]
        (folder / part).mkdir(parents=True)
        for name, text in files.items():
            if text is None:
                save_file({"conv.weight": np.ones((2, 2), np.float32)}, folder / part / name)
            else:
                (folder / part / name).write_text(text)
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

    def examine(bases, *, device, online):
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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    offered = {name: needs for name, needs in project["optional-dependencies"].items() if name != "dev"}
    assert {name: [Requirement(need).name for need in needs] for name, needs in offered.items()} == {
        name: list(packages) for name, (packages, _) in libraries.EXTRAS.items()
    }
    there = examine_extra("some", "pytest", "testing", {})
    assert (there.state, there.found.startswith("pytest "), "for testing" in there.found) == ("ok", True, True)
    missing = examine_extra("some", "no-such-package", "nothing", {})
    assert (missing.state, "texforce-hub[some]" in missing.advice) == ("ok", True)


def test_a_vocabulary_that_is_missing_comes_with_the_package_that_has_it(monkeypatch, tmp_path):
    monkeypatch.setattr(libraries, "find_vocabulary", lambda: tmp_path / "vocabulary.gz")
    assert examine_vocabulary().found == str(tmp_path / "vocabulary.gz")

    def fail():
        raise PipelineError("none")

    monkeypatch.setattr(libraries, "find_vocabulary", fail)
    found = examine_vocabulary()
    assert (found.state, "open_clip_torch" in found.advice) == ("note", True)


def test_where_the_token_comes_from_is_said(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    place = tmp_path / "token"
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(place))
    assert "hf auth login" in examine_token().found
    place.write_text(SECRET)
    assert examine_token().found == "present, from the file that hf auth login wrote"
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
        assert examine_token().found == f"present, from the environment: {name}"
    monkeypatch.setenv("HF_OIDC_RESOURCE", "me/x")  # it would be fetched; nothing is asked here
    assert examine_token().state == "ok"


def test_a_token_file_that_cannot_be_read_is_a_problem(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path))
    assert (examine_token().state, "IsADirectoryError" in examine_token().found) == ("problem", True)


def test_a_base_that_cannot_be_found_offline_is_a_problem_with_its_way_out(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = doctor.examine_base("somebody/some-base")
    assert (offline.state, "hf download somebody/some-base" in offline.advice) == ("problem", True)
    assert "HF_HUB_OFFLINE" in examine_endpoint().advice
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert doctor.examine_base("somebody/some-base").state == "note"
    assert examine_endpoint().state == "ok"


def test_a_problem_makes_the_answer_no(examined, tmp_path):
    run = CliRunner().invoke(cli.app, ["doctor", "--device", "cpu", "--base", str(tmp_path / "nowhere"), "--json"])
    assert run.exit_code == 1
    assert json.loads(run.stdout)["problems"] >= 1


def test_bases_on_disk_are_whole_or_not(tmp_path):
    whole = pipeline_folder(tmp_path / "whole")
    assert doctor.examine_base(str(whole)).state == "ok"
    for part, (_, files) in PARTS.items():
        for name in files.keys() - {"tokenizer_config.json"}:
            content = (whole / part / name).read_bytes()
            (whole / part / name).unlink()
            assert f"lacks {part} (no " in doctor.examine_base(str(whole)).found
            (whole / part / name).write_bytes(content)
    weights = whole / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert "unet (diffusion_pytorch_model.safetensors: truncated" in doctor.examine_base(str(whole)).found
    (whole / "model_index.json").write_text("{")
    assert doctor.examine_base(str(whole)).state == "problem"
    (tmp_path / "empty").mkdir()
    assert "no model_index.json" in doctor.examine_base(str(tmp_path / "empty")).found
    (tmp_path / "one.safetensors").write_bytes(b"x")
    assert doctor.examine_base(str(tmp_path / "one.safetensors")).state == "problem"
    save_file({"conv.weight": np.ones((2, 2), np.float32)}, tmp_path / "one.safetensors")
    assert doctor.examine_base(str(tmp_path / "one.safetensors")).state == "ok"
    assert doctor.examine_base("shapes").state == "ok"


def test_missing_shards_are_named(tmp_path):
    whole = pipeline_folder(tmp_path / "whole")
    index = {"weight_map": {"conv.weight": "diffusion_pytorch_model.safetensors", "b": "other-00002.safetensors"}}
    (whole / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "unet (no other-00002.safetensors)" in doctor.examine_base(str(whole)).found


def test_a_base_in_the_cache_is_found_and_its_links_to_nowhere_are_no_files(cache, tmp_path):
    blobs = pipeline_folder(tmp_path / "blobs")
    commit = "0" * 40
    repository = cache / "models--me--x"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in [path for path in blobs.rglob("*") if path.is_file()]:
        link = repository / "snapshots" / commit / file.relative_to(blobs)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    assert doctor.examine_base("me/x").state == "ok"
    for file in [path for path in blobs.rglob("*") if path.is_file() and path.name != "model_index.json"]:
        file.unlink()
    found = doctor.examine_base("me/x")
    assert (found.state, "unet (no files)" in found.found, found.advice) == ("problem", True, "hf download me/x")


@pytest.mark.parametrize("base", ["x y/z", "a--b/c", "/no/where", "x" * 5_000])
def test_an_odd_base_is_one_problem_with_advice(cache, base):
    (found,) = doctor._examine_bases([base], "")
    assert (found.state, bool(found.advice)) == ("problem", True)


def tried(tmp_path, monkeypatch, **modules):
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    return try_imports(list(modules))


@pytest.mark.parametrize(
    ("code", "state", "part"),
    [("", "ok", "0.1"), ("raise RuntimeError('operator torchvision::nms does not exist')", "problem", "nms")],
)
def test_a_torchvision_that_cannot_be_imported_is_a_problem(tmp_path, monkeypatch, code, state, part):
    attempts = tried(tmp_path, monkeypatch, torchvision=code)
    monkeypatch.setattr(libraries.metadata, "version", lambda name: "0.1")
    found = examine_torchvision(attempts)
    assert (found.state, part in found.found) == (state, True)
    assert bool(found.advice) == (state == "problem")


def test_a_folder_named_torchvision_is_told_from_the_package(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = examine_torchvision({})
    assert (found.state, str(tmp_path / "torchvision") in found.found, "rename" in found.advice) == ("note", True, True)


def test_an_import_that_fails_is_told_from_those_that_fail_through_it(tmp_path, monkeypatch):
    attempts = tried(
        tmp_path,
        monkeypatch,
        first="import os; print('hello'); os.write(1, b'noise')",
        broken="raise OSError('libcudart.so.13: no such file')",
        second="try:\n    import broken\nexcept OSError as error:\n    raise RuntimeError('see above') from error",
        third="import nowhere",
        fourth="raise SystemExit(3)",
    )
    assert attempts == {
        "first": Attempt(),
        "broken": Attempt("OSError: libcudart.so.13: no such file"),
        "second": Attempt("RuntimeError: see above", "broken"),
        "third": Attempt("ModuleNotFoundError: No module named 'nowhere'"),
        "fourth": Attempt("SystemExit: 3"),
    }


@pytest.mark.parametrize(
    ("code", "part"), [("import os; os._exit(7)", "status 7"), ("import time; time.sleep(60)", "not done after 1.5 s")]
)
def test_an_import_that_ends_python_or_never_ends_is_named(tmp_path, monkeypatch, code, part):
    monkeypatch.setattr(imports, "SECONDS", 1.5)
    attempts = tried(tmp_path, monkeypatch, fine="", deadly=code, after="")
    assert (attempts["fine"].reason, part in attempts["deadly"].reason) == ("", True)
    assert attempts["after"] == Attempt("not tried", "deadly")


def test_a_library_that_cannot_be_imported_is_a_problem_and_one_that_needs_it_a_note():
    broken = examine_library("pytest", None, {"pytest": Attempt("OSError: libfoo")})
    assert (broken.state, "OSError: libfoo" in broken.found, "reinstall" in broken.advice) == ("problem", True, True)
    assert examine_library("pytest", None, {"pytest": Attempt("x", "torch")}).state == "note"
    assert examine_extra("some", "pytest", "testing", {"pytest": Attempt("OSError: libfoo")}).state == "problem"


def test_an_examination_that_fails_is_a_problem_and_the_others_are_made():
    def divide():
        yield 1 / 0

    found = list(doctor.watch("some", divide))
    assert [(one.name, one.state, "ZeroDivisionError" in one.found) for one in found] == [("some", "problem", True)]


def test_a_broken_catalogue_hides_no_other_finding(monkeypatch):
    def fail():
        raise ConfigError("catalogue entry a.toml: no TOML")

    monkeypatch.setattr(doctor, "read_catalog", fail)
    monkeypatch.setattr(doctor, "import_all", dict)
    found = {one.name: one for one in doctor.examine(device="cpu")}
    assert (found["catalogue"].state, found["base shapes"].state) == ("problem", "ok")


@pytest.mark.parametrize(
    ("endpoint", "wanted"),
    [
        ("http://user:pw@host", {"torch", "cache", "base x y/z"}),
        ("http://user:pw@host:80x", {"torch", "endpoint"}),
    ],
)
def test_the_machine_on_which_all_is_broken_gets_json_and_one_problem_for_each_cause(tmp_path, endpoint, wanted):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "home").write_text("")
    hidden = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
    settings = {name: value for name, value in os.environ.items() if name not in hidden}
    settings |= {"PYTHONPATH": f"{tmp_path}:{ROOT}", "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint}
    command = [sys.executable, "-m", "texforce_hub", "doctor", "--json", "--base", "x y/z"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=settings, cwd=tmp_path)
    said = json.loads(run.stdout)
    assert {one["name"] for one in said["findings"] if one["state"] == "problem"} == wanted
    assert (run.returncode, said["problems"]) == (1, len(wanted))
    assert all(one["advice"] for one in said["findings"] if one["state"] != "ok")
    assert "pw" not in run.stdout + run.stderr


@pytest.mark.parametrize("endpoint", ["garbage", "", "ftp://host", "http://", "http://h:80x", "me:pw@host"])
def test_an_endpoint_that_is_no_address_is_a_problem(monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    (found,) = doctor.examine_address()
    assert (found.state, "unset" in found.advice, "pw" in found.found) == ("problem", True, False)


def test_a_password_in_the_endpoint_is_not_shown(monkeypatch, caplog):
    monkeypatch.setenv("HF_ENDPOINT", "http://me:pw@host")
    assert list(doctor.examine_address()) == []
    assert examine_endpoint().found.startswith("http://***@host")
    with caplog.at_level(logging.WARNING):
        logging.getLogger("huggingface_hub.utils._http").warning("thrown while requesting GET http://me:pw@host/x@y")
    assert "requesting GET http://***@host/x@y" in caplog.text
    assert "pw" not in caplog.text


def test_a_library_outside_its_range_or_missing_is_said(monkeypatch):
    assert examine_library("pytest", Requirement("pytest<1"), {}).state == "note"
    assert examine_library("pytest", Requirement("pytest>1"), {}).state == "ok"
    missing = examine_library("no-such-library", Requirement("no-such-library>1"), {})
    assert (missing.state, missing.advice) == ("problem", "pip install 'no-such-library>1'")
    monkeypatch.setattr(libraries.metadata, "version", _not_found)
    assert next(one for one in libraries.examine_versions({}) if one.name == "torch").state == "problem"


def _not_found(name):
    raise metadata.PackageNotFoundError(name)


def test_a_device_that_is_not_there_is_a_problem():
    (found,) = examine_device("xpu:7")
    assert (found.state, "--device cpu" in found.advice) == ("problem", True)


def test_the_cache_and_its_size(cache, monkeypatch):
    none, _ = examine_cache()
    assert none.found.endswith("none yet")
    blob = cache / "models--me--x" / "blobs" / "abc"
    snapshot = cache / "models--me--x" / "snapshots" / ("0" * 40)
    for folder in (blob.parent, snapshot, cache / "models--me--x" / "refs"):
        folder.mkdir(parents=True)
    blob.write_bytes(b"x" * 20_000_000)
    (snapshot / "file").symlink_to(blob)
    found, room = examine_cache()
    assert found.found.endswith("1 repositories, 0.02 GB")
    for name in ("version.txt", "version_diffusers_cache.txt"):
        (cache / name).write_text("1")
    assert next(examine_cache()).state == "ok"
    (cache / "models--me").mkdir()
    (cache / "models--me--broken").mkdir()
    assert next(examine_cache()).advice == "2 of its folders are damaged: delete models--me, models--me--broken"
    monkeypatch.setattr(cache_module, "_TIGHT", 10**18)
    assert cache_module._examine_room(cache).state == "note"
    assert room.name == "room"


def test_nothing_heavy_is_imported_for_help():
    code = "import sys, texforce_hub.cli.doctor; print(int('torch' in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert run.stdout.strip() == "0"


def test_an_import_that_took_too_long_is_a_busy_machine_and_no_reinstallation():
    from texforce_hub.cli.doctor.imports import LATE, Attempt

    finding = libraries.examine_library("pytest", None, {"pytest": Attempt(f"not done after 120 s: {LATE}")})
    assert (finding.state, "busy" in finding.found, "install" in finding.advice) == ("note", True, False)


def test_the_hub_is_asked_and_what_it_says_is_one_line(hub, monkeypatch):
    answered = examine_online()
    assert answered.state == "ok"
    assert re.fullmatch(re.escape(hub.url) + r" answered in \d+\.\d s", answered.found)
    hub.fault("/api/models", 429)
    busy = examine_online()
    assert (busy.state, "\n" in busy.found) == ("problem", False)
    assert "429" in busy.found
    assert "wait" in busy.advice


def test_a_token_that_the_hub_does_not_accept_is_a_problem_and_not_shown(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.fault("/api/whoami-v2", 401)
    refused = examine_online()
    assert refused.state == "problem"
    assert "does not accept the token" in refused.found
    assert "log in again" in refused.advice
    assert SECRET not in refused.found + refused.advice


def test_the_hub_names_the_tokens_user(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.fault("/api/whoami-v2", 200, body=b'{"name": "ada"}')
    assert examine_online().found.endswith(", and knows you as ada")


def test_a_hub_that_is_none_or_not_there_or_too_slow_is_one_line(hub, monkeypatch):
    hub.fault("/api/models", 200, body=b'{"no": "list"}', times=1)
    assert "HF_ENDPOINT is no Hub" in examine_online().advice
    hub.fault("/api/models", 200, wait=2.0, times=1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    assert "did not answer in time" in examine_online().found
    monkeypatch.setenv("HF_ENDPOINT", "http://user:password@127.0.0.1:9")
    gone = examine_online()
    assert "cannot be reached" in gone.found
    assert "check the network" in gone.advice
    assert "password" not in gone.found


def test_offline_the_hub_is_not_asked(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = examine_online()
    assert (found.state, found.found) == ("note", "not asked: HF_HUB_OFFLINE is set")
    assert hub.log == []


def test_the_hub_is_asked_only_on_request(hub, monkeypatch):
    monkeypatch.setattr(doctor, "import_all", dict)
    names = [{finding.name for finding in doctor.examine(device="cpu", online=online)} for online in (False, True)]
    assert names[1] - names[0] == {"online"}
