"""Sidecars: read as far as they can be, shown beside the file, believed against it never, and carried whole."""

import hashlib
import json
import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from texforce_hub import cli
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import DialectError
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.inspect import inspect_file
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.sidecar_copies import carry_sidecars
from texforce_hub.hub.sidecars import find_contradictions, find_sidecars
from texforce_hub.hub.write import write_adapter

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 40
WEBP = b"RIFF\x10\0\0\0WEBP"
A1111 = {
    "description": "A cat.",
    "sd version": "SD1",
    "activation text": "a photo of mycat",
    "preferred weight": 0.8,
    "negative text": "dog",
    "notes": "made at home",
}
ATTENTION = "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj"


def write_file(path):
    torch.manual_seed(0)
    layers = {ATTENTION.format(i): LowRank(torch.randn(4, 768), torch.randn(768, 4)) for i in range(2)}
    return write_adapter(Adapter(layers), path, dialect="kohya")


def civitai(path, **said):
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest().upper()
    return {
        "id": 7,
        "modelId": 5,
        "name": "v1",
        "baseModel": "SD 1.5",
        "trainedWords": ["mycat", "sitting"],
        "description": "<p>A <b>cat</b> &amp; more</p>",
        "model": {"name": "My cat", "type": "LORA", "nsfw": False, "allowCommercialUse": ["Image"]},
        "files": [{"hashes": {"SHA256": sha256, "AutoV2": sha256[:10]}}],
    } | said


def write_sidecars(path, **said):
    path.with_suffix(".json").write_text(json.dumps(A1111))
    path.with_suffix(".civitai.info").write_text(json.dumps(civitai(path, **said)))
    path.with_suffix(".png").write_bytes(PNG)
    path.with_suffix(".preview.webp").write_bytes(WEBP)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_every_kind_is_found_and_says_what_it_holds(tmp_path):
    path = write_file(tmp_path / "my.cat.v1.safetensors")
    write_sidecars(path)
    found = {one.ending: one for one in find_sidecars(path)}
    assert set(found) == {".json", ".civitai.info", ".png", ".preview.webp"}
    assert [one.problem for one in found.values()] == [None] * 4
    user, answer = found[".json"], found[".civitai.info"]
    assert (user.trigger_words, user.preferred_weight, user.family) == (("a photo of mycat",), 0.8, "sd1")
    assert (user.negative, user.notes, user.description) == ("dog", "made at home", "A cat.")
    assert (answer.name, answer.trigger_words, answer.family) == ("My cat · v1", ("mycat", "sitting"), "sd1")
    assert answer.description == "A cat & more"
    assert answer.link == "https://civitai.com/models/5?modelVersionId=7"
    assert answer.licence == "commercial use: Image"
    assert answer.sha256 == (hashlib.sha256(path.read_bytes()).hexdigest(),)


def test_other_managers_files_and_texts_are_read_and_carried(tmp_path):
    path = write_file(tmp_path / "in" / "cat.safetensors")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    answer = {"id": 7, "modelId": 5, "trainedWords": ["mycat"]}
    own = {"model_name": "My cat", "base_model": "SD 1.5", "sha256": sha256, "notes": "good", "civitai": answer}
    matrix = {
        "ModelName": "My cat",
        "VersionName": "v1",
        "ModelId": 5,
        "VersionId": 7,
        "BaseModel": "SDXL 1.0",
        "TrainedWords": ["mycat"],
        "Hashes": {"SHA256": sha256.upper(), "AutoV2": sha256[:10]},
    }
    path.with_suffix(".metadata.json").write_text(json.dumps(own))
    path.with_suffix(".cm-info.json").write_text(json.dumps(matrix))
    path.with_suffix(".txt").write_text("A cat\non a mat.")
    found = {one.kind: one for one in find_sidecars(path)}
    assert set(found) == {"LoRA Manager", "Stability Matrix", "text"}
    manager, stability, text = found["LoRA Manager"], found["Stability Matrix"], found["text"]
    assert (manager.name, manager.notes, manager.family) == ("My cat", "good", "sd1")
    assert (stability.name, stability.family) == ("My cat · v1", "sdxl")
    for one in (manager, stability):
        assert one.link == "https://civitai.com/models/5?modelVersionId=7"
        assert (one.trigger_words, one.sha256) == (("mycat",), (sha256,))
    assert text.description == "A cat on a mat."
    assert "LoRA Manager" in run("inspect", path).stdout
    convert_adapter(path, tmp_path / "out" / "new.safetensors")
    names = {"new.metadata.json", "new.cm-info.json", "new.txt", "new.safetensors"}
    assert {one.name for one in (tmp_path / "out").iterdir()} == names


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_out_of_the_folder_is_neither_read_nor_copied(tmp_path):
    path = write_file(tmp_path / "in" / "cat.safetensors")
    secret = tmp_path / "secret"
    secret.write_text('{"notes": "hunter2"}')
    path.with_suffix(".civitai.info").symlink_to(secret)
    path.with_suffix(".txt").symlink_to("../secret")
    (tmp_path / "in" / "facts").mkdir()
    (tmp_path / "in" / "facts" / "real.json").write_text('{"notes": "mine"}')
    path.with_suffix(".json").symlink_to("facts/real.json")
    shown = run("inspect", path)
    assert "hunter2" not in shown.output
    assert "cat.txt is unreadable: a link to another place, which is not followed" in shown.output
    done = run("convert", path, "--output", tmp_path / "out" / "new.safetensors")
    assert done.exit_code == 0
    assert done.stderr.count("not copied: a link to another place") == 1
    assert {one.name for one in (tmp_path / "out").iterdir()} == {"new.safetensors", "new.json"}
    assert not (tmp_path / "out" / "new.json").is_symlink()


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_hub_caches_own_links_are_followed_inside_their_repository(tmp_path):
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "abc").write_text('{"notes": "mine"}')
    snapshot = repository / "snapshots" / ("0" * 40)
    path = write_file(snapshot / "deep" / "cat.safetensors")
    path.with_suffix(".json").symlink_to("../../../blobs/abc")
    (tmp_path / "secret.txt").write_text("x")
    path.with_suffix(".txt").symlink_to(tmp_path / "secret.txt")
    assert {one.ending: one.problem is None for one in find_sidecars(path)} == {".json": True, ".txt": False}


def test_what_belongs_to_another_file_is_no_sidecar(tmp_path):
    path = write_file(tmp_path / "cat.safetensors")
    for name in ("cat2.json", "cat.safetensors.index.json", "cat.md", "dog.png", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "cat.png").mkdir()
    assert find_sidecars(path) == ()


@pytest.mark.parametrize(
    ("base", "family"),
    [
        *(("SD 1.5", "sd1"), ("SD 1.5 LCM", "sd1"), ("SD 2.1 768", "sd2"), ("SD2", "sd2"), ("SDXL 1.0", "sdxl")),
        *(("SDXL Turbo", "sdxl"), ("Pony", "sdxl"), ("Illustrious", "sdxl"), ("NoobAI", "sdxl"), ("SD 3.5", "sd3")),
        *(("Flux.1 D", "flux"), ("PixArt a", "pixart"), ("Pony V7", None), ("Unknown", None), ("Other", None)),
        *(("Flux.2 D", None), ("", None)),
    ],
)
def test_the_names_that_managers_give_base_models_mean_families(tmp_path, base, family):
    (tmp_path / "x.json").write_text(json.dumps({"sd version": base}))
    (found,) = find_sidecars(tmp_path / "x.safetensors")
    assert found.family == family


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[1]", "holds a JSON list"),
        (b'"text"', "holds a JSON str"),
        (b"\xff\xfe\x00", "no UTF-8 text"),
        (b"[" * 200_000, "recursion|nested"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "limit"),
        (b" " * 4_000_001, "more than 4000000 bytes"),
    ],
    ids=["empty", "cut", "list", "text", "bytes", "deep", "digits", "large"],
)
@pytest.mark.parametrize("ending", [".json", ".civitai.info", ".metadata.json", ".cm-info.json"])
def test_what_cannot_be_read_says_why_and_stops_nothing(tmp_path, content, why, ending):
    path = write_file(tmp_path / "x.safetensors")
    (tmp_path / f"x{ending}").write_bytes(content)
    (found,) = find_sidecars(path)
    assert re.search(why, found.problem or ""), found.problem
    facts = inspect_file(path)
    assert facts.error is None
    assert any(line.startswith(f"x{ending} is unreadable") for line in facts.problems)
    shown = run("inspect", path)
    assert (shown.exit_code, "unreadable" in shown.stdout) == (0, True)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    *("activation text", "preferred weight", "sd version", "description", "notes", "negative text"),
    *("trainedWords", "baseModel", "model", "files", "id", "modelId", "name"),
    *("civitai", "base_model", "model_name", "sha256", "modelDescription"),
    *("ModelName", "VersionName", "BaseModel", "TrainedWords", "ModelId", "VersionId", "Hashes"),
)


@settings(deadline=None, max_examples=60)
@given(said=st.dictionaries(st.sampled_from(KEYS), JSON), files=st.lists(JSON, max_size=2), hashes=JSON)
def test_odd_types_are_read_as_nothing(tmp_path_factory, said, files, hashes):
    folder = tmp_path_factory.mktemp("odd")
    said |= {"files": [*files, {"hashes": hashes}, {"hashes": {"SHA256": hashes}}]}
    for ending in (".json", ".civitai.info", ".metadata.json", ".cm-info.json"):
        (folder / f"x{ending}").write_text(json.dumps(said))
    for one in find_sidecars(folder / "x.safetensors"):
        assert one.problem is None
        assert all(one.trigger_words)
        assert one.preferred_weight is None or isinstance(one.preferred_weight, float)
        assert all(isinstance(line, str) for line in find_contradictions(one, ("sd1",), "0" * 64))
        json.dumps(one.as_dict(), allow_nan=False)


def test_a_picture_that_is_none_is_said_to_be_none(tmp_path):
    path = write_file(tmp_path / "x.safetensors")
    (tmp_path / "x.png").write_bytes(b"<!DOCTYPE html>")
    (tmp_path / "x.jpg").write_bytes(b"")
    assert all("no " in (one.problem or "") for one in find_sidecars(path))
    assert len(inspect_file(path).problems) == 2


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_pipe_beside_a_file_is_never_opened(tmp_path):
    path = write_file(tmp_path / "x.safetensors")
    os.mkfifo(tmp_path / "x.json")
    assert find_sidecars(path) == ()


def test_a_sidecar_that_contradicts_its_file_is_named(tmp_path):
    path = write_file(tmp_path / "x.safetensors")
    write_sidecars(path, baseModel="SD 2.1", files=[{"hashes": {"SHA256": "AB" * 32}}])
    problems = inspect_file(path).problems
    assert any("x.civitai.info says base SD 2.1, the file's layers fit sd1" in line for line in problems)
    assert any("x.civitai.info is about a file of SHA-256 abababababab" in line for line in problems)
    write_sidecars(path)
    assert not any("x.civitai.info" in line for line in inspect_file(path).problems)


def test_the_panel_the_table_and_the_json_show_them(tmp_path):
    path = write_file(tmp_path / "a.safetensors")
    write_sidecars(path)
    write_file(tmp_path / "b.safetensors")
    panel = " ".join(run("inspect", path).stdout.split())
    for text in ("trigger words: mycat, sitting", "preferred weight: 0.8", "link: https://civitai.com/models/5"):
        assert text in panel
    table = run("inspect", tmp_path).stdout
    assert "beside" in table
    assert "json," in table
    first, second = json.loads(run("inspect", tmp_path, "--json").stdout)["files"]
    assert [one["kind"] for one in first["sidecars"]] == ["A1111", "Civitai", "preview", "preview"]
    assert first["sidecars"][1]["trigger_words"] == ["mycat", "sitting"]
    assert second["sidecars"] == []


def test_escapes_in_sidecars_are_never_printed_raw(tmp_path):
    path = write_file(tmp_path / "x.safetensors")
    evil = "\x1b[2J[red]x[/red]\x07\x9b"
    (tmp_path / "x.json").write_text(json.dumps({"activation text": evil, "notes": evil}))
    for arguments in (("inspect", path), ("inspect", path, "--json"), ("inspect", tmp_path)):
        shown = run(*arguments)
        assert shown.exit_code == 0
        assert not set("\x1b\x07\x9b") & set(shown.output)
    assert "[red]x[/red]" in run("inspect", path).stdout


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "peft"])
def test_convert_takes_them_along_under_the_outputs_name(tmp_path, dialect):
    path = write_file(tmp_path / "in" / "cat.v1.safetensors")
    write_sidecars(path)
    before = {one.ending: one.path.read_bytes() for one in find_sidecars(path)}
    output = tmp_path / "out" / ("new" if dialect == "peft" else "new.v2.safetensors")
    shown = run("convert", path, "--dialect", dialect, "--output", output)
    assert shown.exit_code == 0, shown.output
    assert "will not find this one" in shown.stderr
    tensors = output / "adapter_model.safetensors" if dialect == "peft" else output
    after = {one.ending: one.path.read_bytes() for one in find_sidecars(tensors)}
    assert after == before
    assert {one.ending: one.path.read_bytes() for one in find_sidecars(path)} == before
    if dialect == "peft":
        read_adapter(output)  # the folder is still one adapter


def test_convert_leaves_them_where_they_are_if_told_so(tmp_path):
    path = write_file(tmp_path / "cat.safetensors")
    write_sidecars(path)
    shown = run("convert", path, "--output", tmp_path / "out.safetensors", "--no-sidecars")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert find_sidecars(tmp_path / "out.safetensors") == ()
    convert_adapter(path, tmp_path / "again.safetensors", sidecars=False)
    assert find_sidecars(tmp_path / "again.safetensors") == ()


def test_another_files_sidecar_is_never_written_over(tmp_path):
    path = write_file(tmp_path / "in" / "cat.safetensors")
    write_sidecars(path)
    foreign = tmp_path / "out" / "cat.json"
    foreign.parent.mkdir()
    foreign.write_text('{"notes": "mine"}')
    shown = run("convert", path, "--output", tmp_path / "out" / "cat.safetensors", "--json")
    (done,) = json.loads(shown.stdout)["files"]
    assert foreign.read_text() == '{"notes": "mine"}'
    assert any("is there already" in note for note in done["notes"])
    assert len(find_sidecars(tmp_path / "out" / "cat.safetensors")) == 4
    assert carry_sidecars(path, tmp_path / "out" / "cat.safetensors") == tuple(done["notes"][:1])  # the rest is equal


def test_a_link_to_nowhere_has_the_name_too(tmp_path):
    path = write_file(tmp_path / "in" / "cat.safetensors")
    write_sidecars(path)
    (tmp_path / "out").mkdir()
    link = tmp_path / "out" / "cat.json"
    link.symlink_to("nowhere")
    assert any(str(link) in note for note in carry_sidecars(path, tmp_path / "out" / "cat.safetensors"))
    assert link.is_symlink()


def test_many_conversions_say_one_thing_once(tmp_path):
    for name in ("a", "b", "c"):
        write_sidecars(write_file(tmp_path / "in" / f"{name}.safetensors"))
    shown = run("convert", tmp_path / "in", "--output", tmp_path / "out")
    assert shown.exit_code == 0
    (note,) = [line for line in shown.stderr.splitlines() if "SHA-256" in line]
    assert "(and of 2 more files)" in note
    assert len(list((tmp_path / "out").iterdir())) == 3 * 5


def test_a_conversion_that_fails_copies_nothing(tmp_path):
    path = write_file(tmp_path / "in" / "cat.safetensors")
    write_sidecars(path)
    with pytest.raises(DialectError):
        convert_adapter(path, tmp_path / "out" / "cat.safetensors", dialect="klingon")
    assert not (tmp_path / "out").exists()


def test_a_sidecar_that_cannot_be_copied_is_said_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = write_file(tmp_path / "in" / "cat.safetensors")
    write_sidecars(path)

    def fill_the_disk(source, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("texforce_hub.hub.sidecar_copies.shutil.copyfile", fill_the_disk)
    notes = carry_sidecars(path, tmp_path / "out" / "cat.safetensors")
    assert len(notes) == 4
    assert all("not copied" in note and "No space left" in note for note in notes)
    assert not list(tmp_path.glob("out/*"))


def test_in_a_folder_with_another_adapter_they_go_beside_the_new_one(tmp_path):
    path = write_file(tmp_path / "in" / "cat.safetensors")
    write_sidecars(path)
    write_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    shown = run("convert", path, "--dialect", "peft", "--output", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    assert len(find_sidecars(tmp_path / "out" / "adapter_model.safetensors")) == 4
    assert find_sidecars(tmp_path / "out" / "pytorch_lora_weights.safetensors") == ()
