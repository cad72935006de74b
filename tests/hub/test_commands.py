"""The commands with references to the Hub, and recipes that can be done again from them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from tests.support.hub_session import adapter_bytes, find_file, forget, kohya_bytes, peft_files, pickle_bytes
from texforce_hub import cli
from texforce_hub.errors import RecipeError, TexForceHubError
from texforce_hub.hub.read import read_adapter
from texforce_hub.merge.replay import read_recipe, verify_merge
from texforce_hub.recipe import Recipe

ZOO = {
    "README.md": b"# many adapters",
    "style.safetensors": adapter_bytes(1),
    "old/kohya.safetensors": kohya_bytes(2),
    "broken.safetensors": b"\xff" * 64,
}


def run(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if isinstance(result.exception, TexForceHubError):
        return 2, f"{result.output}error: {result.exception}"
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_repository_of_many_adapters_is_one_table_and_nothing_is_fetched(hub, tmp_path):
    commit = hub.commit("me/zoo", ZOO)
    status, output = run("inspect", "me/zoo")
    assert (status, "1 of 3 files are no readable adapters" in output) == (2, True)
    assert f"me/zoo@{commit}" in output
    for word in ("style", "old/kohya", "broken", "unreadable", "README"):
        assert (word in output) == (word != "README")
    assert not (tmp_path / "cache").exists()


def test_the_table_of_a_repository_is_sorted_filtered_and_json(hub):
    commit = hub.commit("me/zoo", ZOO)
    _, output = run("inspect", "me/zoo", "--json", "--sort", "size", "--family", "sd1")
    found = json.loads(output.partition("error:")[0])["files"]
    assert [one["path"] for one in found] == [
        f"me/zoo@{commit}/{name}" for name in ("old/kohya.safetensors", "style.safetensors", "broken.safetensors")
    ]
    sizes = {one["path"].rpartition("/")[2]: one["size"] for one in found}
    assert sizes["style.safetensors"] == len(ZOO["style.safetensors"])
    kohya = found[0]
    assert (kohya["alphas"], kohya["ranks"]) == ({"4.0": 2}, {"8": 2})
    assert kohya["sha256"] == hub.repos["me/zoo"].commits[commit]["old/kohya.safetensors"].sha256
    assert kohya["autov2"] == kohya["sha256"][:10]
    status, output = run("inspect", "me/zoo/style.safetensors", "me/zoo", "--family", "sd2", "--json")
    assert status == 2
    left = json.loads(output.partition("error:")[0])["files"]
    assert [one["path"].rpartition("/")[2] for one in left] == ["broken.safetensors"]


def test_a_table_of_a_repository_costs_two_requests_a_file_and_says_what_it_left(hub):
    hub.commit("me/zoo", {f"{i}.safetensors": kohya_bytes(12, rank=16) for i in range(5)})
    status, output = run("inspect", "me/zoo", "--json")
    assert (status, len(hub.log)) == (0, 1 + 2 * 5)
    assert hub.sent < 5 * 110_000
    for one in json.loads(output)["files"]:
        assert set(one["alphas"]) == {"4.0"}
        assert one["notes"] == [
            "alphas not fetched, or few of them; inspect one file alone for more, or with --weights for all"
        ]
    hub.log.clear()
    assert "5 of 5 files: alphas not fetched" in run("inspect", "me/zoo")[1]
    alone = json.loads(run("inspect", "me/zoo/3.safetensors", "--json")[1])["files"][0]
    assert (alone["alphas"], alone["notes"]) == ({"4.0": 12}, [])


def test_alphas_that_nobody_looked_at_are_unknown_and_not_missing(hub, monkeypatch):
    monkeypatch.setattr("texforce_hub.hub.huggingface.ranges._FIRST", 3_000)
    late = {f"lora_te_text_model_encoder_layers_{i}_mlp_fc1": (8, 768, 3072) for i in range(2)}
    tensors = {}
    for layer, (rank, columns, rows) in late.items():
        tensors[f"{layer}.lora_down.weight"] = torch.zeros(rank, columns)
        tensors[f"{layer}.lora_up.weight"] = torch.zeros(rows, rank)
        tensors[f"{layer}.alpha"] = torch.tensor(4.0, dtype=torch.bfloat16)  # behind all that is wider
    hub.commit("me/late", {f"{i}.safetensors": save(tensors) for i in range(2)})
    assert [one["alphas"] for one in json.loads(run("inspect", "me/late", "--json")[1])["files"]] == [None, None]
    assert "8 / ?" in run("inspect", "me/late")[1]
    monkeypatch.setattr("texforce_hub.hub.huggingface.ranges._WHOLE", 0)
    monkeypatch.setattr("texforce_hub.hub.huggingface.ranges._MOST", 1)
    monkeypatch.setattr("texforce_hub.hub.huggingface.ranges._MOST_BYTES", 1)
    _, output = run("inspect", "me/late/1.safetensors", "--json")
    (one,) = json.loads(output)["files"]
    assert (one["alphas"], one["problems"]) == ({"4.0": 1}, [])
    assert "not fetched but for 1 of 2;" in one["notes"][0]


def test_a_damaged_file_is_named_alike_whether_it_is_cached_or_not(hub):
    hub.commit("me/bad", {"a.safetensors": adapter_bytes(1), "b.safetensors": adapter_bytes(2)[:-1]})
    before = json.loads(run("inspect", "me/bad", "--json")[1].partition("error:")[0])["files"]
    for name in ("a", "b"):
        find_file(f"me/bad/{name}.safetensors")
    after = json.loads(run("inspect", "me/bad", "--json")[1].partition("error:")[0])["files"]
    assert [one["error"] for one in before] == [one["error"] for one in after]
    assert before[1]["error"].startswith("truncated")


SIDECARS = {
    "l/000.json": json.dumps({"activation text": "a red cube", "sd version": "SD1"}).encode(),
    "l/000.civitai.info": b"[",
    "l/000.preview.png": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "l/other.json": b"{}",
}


def test_sidecars_on_the_hub_are_listed_by_name_and_read_where_one_file_is_meant(hub, tmp_path):
    hub.commit("me/zoo", {"l/000.safetensors": adapter_bytes(1), "l/001.safetensors": adapter_bytes(2), **SIDECARS})
    _, output = run("inspect", "me/zoo", "--json")
    beside = [[one["ending"] for one in file["sidecars"]] for file in json.loads(output)["files"]]
    assert beside == [[".json", ".civitai.info", ".preview.png"], []]
    assert not (tmp_path / "cache").exists()
    _, output = run("inspect", "me/zoo/l/000.safetensors", "--json")
    (one,) = json.loads(output)["files"]
    text, broken, picture = one["sidecars"]
    assert text["trigger_words"] == ["a red cube"]
    assert text["path"].endswith("/l/000.json")
    assert text["path"].startswith("me/zoo@")
    _, output = run("inspect", "me/zoo/l/000.safetensors", "--weights", "--json")
    assert [one["ending"] for one in json.loads(output)["files"][0]["sidecars"]] == beside[0]
    assert ("JSON" in broken["problem"] or "Expecting" in broken["problem"], "problem" in picture) == (True, False)


def test_convert_carries_the_sidecars_from_the_hub(hub, tmp_path):
    hub.commit("me/zoo", {"l/000.safetensors": adapter_bytes(1), "l/001.safetensors": adapter_bytes(2), **SIDECARS})
    assert run("convert", "me/zoo/l/000.safetensors", "--output", "new.safetensors", "--no-sidecars")[0] == 0
    assert not list(tmp_path.glob("new.*n*o"))
    hub.log.clear()
    status, _ = run("convert", "me/zoo/l/000.safetensors", "--output", tmp_path / "out" / "new.safetensors")
    assert status == 0
    for name, content in SIDECARS.items():
        if name.startswith("l/000"):
            assert (tmp_path / "out" / name.replace("l/000", "new")).read_bytes() == content
    status, _ = run("convert", "me/zoo", "--output", tmp_path / "all", "--dialect", "kohya")
    assert status == 0
    assert (tmp_path / "all" / "l" / "000.json").read_bytes() == SIDECARS["l/000.json"]


def test_a_sidecar_that_cannot_be_fetched_is_a_note_and_stops_nothing(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("texforce_hub.hub.remote_sidecars._LONGEST_SIDECAR", 45)
    hub.commit("me/zoo", {"l/000.safetensors": adapter_bytes(1), **SIDECARS})
    hub.fault(r"/resolve/.*civitai", 403)
    status, output = run("convert", "me/zoo/l/000.safetensors", "--output", "new.safetensors", "--json")
    assert status == 0
    notes = json.loads(output[output.index("{") :])["files"][0]["notes"]
    assert sum("left on the Hub" in note for note in notes) == 3
    assert (tmp_path / "new.safetensors").is_file()


def test_what_is_on_the_hub_and_here_is_shown_in_one_table(hub, tmp_path):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    (tmp_path / "b.safetensors").write_bytes(adapter_bytes(2))
    status, output = run("inspect", "me/x", tmp_path / "b.safetensors", "--json")
    assert status == 0
    assert [one["path"].rpartition("/")[2] for one in json.loads(output)["files"]] == ["a.safetensors", "b.safetensors"]
    assert run("inspect", "me/x", tmp_path / "b.safetensors")[0] == 0


def test_one_file_on_the_hub_is_shown_as_one_here(hub, tmp_path):
    commit = hub.commit("me/peft", peft_files(alpha=16))
    status, output = run("inspect", "me/peft")
    assert status == 0
    for part in (f"me/peft@{commit}/adapter_model.safetensors", "16 × 1", "2 × 1", "AutoV2"):
        assert part in output.replace("\n", ""), part
    assert not (tmp_path / "cache").exists()
    status, output = run("inspect", "me/peft", "--weights", "--verbose")
    assert (status, "q_proj" in output) == (0, True)


def test_a_fault_in_the_middle_of_a_table_stops_nothing(hub):
    hub.commit("me/zoo", ZOO)
    hub.fault("resolve/.*/style", 403)
    status, output = run("inspect", "me/zoo")
    assert (status, "2 of 3 files" in output) == (2, True)
    assert "may not read this" in output


def test_pickles_are_shown_as_such_and_converted_with_leave(hub, tmp_path):
    hub.commit("me/old", {"pytorch_lora_weights.bin": pickle_bytes(tmp_path)})
    status, output = run("inspect", "me/old")
    assert (status, "pickle" in output) == (0, True)
    status, output = run("inspect", "me/old", "--weights")
    assert (status, "not read unasked" in output) == (2, True)
    status, output = run("convert", "me/old", "--output", "new.safetensors")
    assert (status, "--allow-pickle" in output) == (2, True)
    assert not (tmp_path / "new.safetensors").exists()
    assert run("convert", "me/old", "--output", "new.safetensors", "--allow-pickle")[0] == 0
    assert len(read_adapter("./new.safetensors").layers) == 1


def test_check_and_convert_fetch_what_they_need(hub, tmp_path):
    hub.commit("me/zoo", {name: content for name, content in ZOO.items() if name != "broken.safetensors"})
    assert run("check", "me/zoo/style.safetensors", "--base", "sd1")[0] == 0
    assert run("check", "me/zoo/style.safetensors", "--base", "sdxl")[0] in (0, 1)
    assert run("check", "me/zoo/lost.safetensors", "--base", "sd1")[0] == 2
    assert run("convert", "me/zoo", "--dialect", "kohya", "--output", "out")[0] == 0
    assert sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.safetensors")
    ) == [
        "old/kohya.safetensors",
        "style.safetensors",
    ]


def test_a_merge_from_the_hub_is_recorded_with_its_commits_and_can_be_done_again(hub, tmp_path):
    first = hub.commit("me/a", {"a.safetensors": adapter_bytes(1)})
    hub.commit("me/b", {"b.safetensors": adapter_bytes(2)})
    assert run("merge", "me/a:0.7", "me/b:0.3", "--method", "svd", "--output", "merged.safetensors")[0] == 0
    source = read_recipe("merged.safetensors").sources[0]
    assert (source.source, source.revision) == (f"hf://me/a@{first}/a.safetensors", first)
    assert source.sha256 == hub.repos["me/a"].commits[first]["a.safetensors"].sha256
    hub.commit("me/a", {"a.safetensors": adapter_bytes(9)})
    forget()
    assert verify_merge("merged.safetensors").same
    assert not torch.equal(_first_delta("me/a"), _first_delta(source.source))
    edited = str(read_recipe("merged.safetensors")).replace(f"@{first}", "")
    (tmp_path / "edited.toml").write_text(edited)
    with pytest.raises(RecipeError, match="it changed"):
        cli.merge.merge(recipe=tmp_path / "edited.toml", output=tmp_path / "again.safetensors")


def _first_delta(ref):
    adapter = read_adapter(ref)
    return adapter.delta(next(iter(adapter.layers)))


def test_a_drawing_from_the_hub_is_recorded_with_its_commits(hub, tmp_path):
    from texforce_hub.generate.draw import DrawSettings
    from texforce_hub.generate.recipe import DrawRun, record_run, replay_run
    from texforce_hub.hub.refs.adapter import AdapterRef

    commit = hub.commit("me/a", {"a.safetensors": adapter_bytes(1)})
    refs = (AdapterRef.parse("me/a@main:0.5"),)
    record_run(DrawRun("shapes", refs, DrawSettings(("a cat",)), unet="me/a/a.safetensors:0.2"), tmp_path / "run.toml")
    recipe = Recipe.parse((tmp_path / "run.toml").read_text())
    assert (recipe.sources[0].source, recipe.sources[0].revision) == (f"hf://me/a@{commit}/a.safetensors", commit)
    assert recipe.settings["unet"] == f"hf://me/a@{commit}/a.safetensors:0.2"
    again = replay_run(tmp_path / "run.toml")
    assert again.adapters == (AdapterRef(f"hf://me/a@{commit}/a.safetensors", "a-main", 0.5),)


def test_a_new_process_reads_the_hub_by_its_environment_and_the_cache_without_one(hub, tmp_path):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()}, private=True)
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token}
    ways = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    ways["PYTHONPATH"] = str(Path(__file__).parents[2])

    def check(**more):
        command = [sys.executable, "-m", "texforce_hub", "check", "me/x", "--base", "sd1"]
        return subprocess.run(command, env=ways | more, capture_output=True, text=True, check=False)

    first = check(**variables)
    assert (first.returncode, "fits: all 2 layers" in first.stdout) == (0, True), first.stderr
    assert "fetching me/x@" in first.stderr
    assert hub.token not in first.stdout + first.stderr
    asked = len(hub.log)
    again = check(HF_HOME=variables["HF_HOME"], HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout, len(hub.log)) == (0, first.stdout, asked)
    refused = check(HF_HOME=str(tmp_path / "other"), HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: 'me/x' is no file or folder here, and as a Hub id: me/x: not in the cache")
