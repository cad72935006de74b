"""References to the Hub: which file they mean, where it is looked for first, and what can be read offline."""

import logging

import pytest
import torch
from safetensors.torch import save

from tests.support.hub_session import LAYER, adapter_bytes, find_file, find_files, forget, peft_files, pickle_bytes
from texforce_hub.errors import FileError, HubError, RefError
from texforce_hub.hub.catalog import CatalogEntry
from texforce_hub.hub.find import find_local, find_path, list_adapters, pin_source
from texforce_hub.hub.read import read_adapter


def test_a_reference_is_fetched_once_and_its_place_says_where_it_is_from(hub, tmp_path, caplog):
    commit = hub.commit("me/x", {"pytorch_lora_weights.safetensors": adapter_bytes(), "README.md": b"# x"})
    with caplog.at_level(logging.INFO, logger="texforce_hub"):
        path = find_file("me/x:0.7")
    assert path.read_bytes() == adapter_bytes()
    assert pin_source("me/x", path) == (f"hf://me/x@{commit}/pytorch_lora_weights.safetensors", commit)
    assert pin_source("./x", tmp_path) == ("./x", "")
    assert f"fetching me/x@{commit[:12]}/pytorch_lora_weights.safetensors, 0.03 MB" in caplog.text
    forget()
    hub.log.clear()
    assert find_file("hf://me/x") == path
    assert [request.path for request in hub.log] == ["/api/models/me/x?blobs=true"]
    assert read_adapter(f"me/x@{commit}").layers.keys() == read_adapter(path).layers.keys()


def test_revisions_files_and_folders_in_a_repository_are_found(hub):
    old = hub.commit("me/x", {"a.safetensors": adapter_bytes(1)}, tag="v1")
    hub.commit("me/x", {"a.safetensors": adapter_bytes(2), "steps/10/adapter_model.safetensors": adapter_bytes(3)})
    assert find_file("me/x@v1").read_bytes() == adapter_bytes(1)
    assert find_file(f"me/x@{old}/a.safetensors").read_bytes() == adapter_bytes(1)
    assert find_file("me/x/a.safetensors").read_bytes() == adapter_bytes(2)
    assert find_file("me/x/steps/10").read_bytes() == adapter_bytes(3)
    assert [path.name for path in find_files("me/x")] == ["a.safetensors", "adapter_model.safetensors"]
    folder = find_path("me/x")
    assert [path.relative_to(folder).as_posix() for path in find_files("me/x")] == [
        "a.safetensors",
        "steps/10/adapter_model.safetensors",
    ]
    assert find_path("me/x/steps") == folder / "steps"
    assert find_path("me/x/a.safetensors") == folder / "a.safetensors"


def test_a_peft_folder_comes_with_its_config(hub):
    hub.commit("me/peft", peft_files(alpha=16))
    adapter = read_adapter("me/peft")
    assert {getattr(layer, "scale", None) for layer in adapter.layers.values()} == {8.0}
    assert (find_file("me/peft").parent / "adapter_config.json").is_file()


def test_the_file_in_a_repository_is_chosen_as_in_a_folder(hub, tmp_path):
    model = save({"conv_in.weight": torch.ones(1)})
    hub.commit("me/one", {"model.safetensors": model, "style.safetensors": adapter_bytes()})
    assert find_file("me/one").name == "style.safetensors"
    hub.commit("me/many", {"a.safetensors": adapter_bytes(), "b.safetensors": adapter_bytes(1)})
    with pytest.raises(RefError, match=r"me/many@\w{12}: holds 2 adapters, a\.safetensors, b\.safetensors; name the"):
        find_file("me/many")
    hub.commit("me/none", {"README.md": b"#", "x.txt": b"x"})
    with pytest.raises(RefError, match=r"holds no adapter file; it holds README\.md, x\.txt"):
        find_file("me/none")
    with pytest.raises(RefError, match=r"holds no tensor file; it holds README\.md, x\.txt"):
        list_adapters("me/none")
    with pytest.raises(RefError, match=r"holds no file 'b\.safetensors'; it holds README\.md, x\.txt"):
        find_file("me/none/b.safetensors")


def test_a_folder_here_is_used_before_the_hub_and_that_is_said_once(hub, tmp_path, caplog):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    (tmp_path / "me/x").mkdir(parents=True)
    (tmp_path / "me/x/a.safetensors").write_bytes(adapter_bytes(5))
    with caplog.at_level(logging.INFO, logger="texforce_hub"):
        assert find_file("me/x").read_bytes() == adapter_bytes(5)
        assert find_file("./me/x").read_bytes() == adapter_bytes(5)
        find_file("me/x")
    assert [record.message for record in caplog.records] == [
        "me/x: the folder here is used; for the Hub repository of that name write hf://me/x"
    ]
    assert not hub.log
    assert find_file("hf://me/x").read_bytes() == adapter_bytes()


@pytest.mark.parametrize("name", ["./me/x", "lost/x.safetensors", "nothing", "/no/where", "me/x@"])
def test_names_that_can_be_none_on_the_hub_never_ask_it(hub, name):
    with pytest.raises(RefError):
        find_local(name)
    assert not hub.log


def test_what_was_fetched_can_be_read_offline_by_branch_tag_and_commit(hub, offline, caplog):
    commit = hub.commit("me/x", {"a.safetensors": adapter_bytes()}, tag="v1")
    path = find_file("me/x")
    forget()
    assert find_file("me/x@v1") == path
    offline()
    hub.log.clear()
    for name in ("me/x", f"me/x@{commit}", f"me/x@{commit}/a.safetensors"):
        assert find_file(name) == path
    assert not hub.log
    assert f"offline: using me/x@{commit[:12]} from the cache" in caplog.text
    with pytest.raises(HubError, match=f"of me/x the cache holds {commit[:12]}"):
        find_file("me/x@v9")
    with pytest.raises(HubError, match=r"'me/y' is no file.*not in the cache .*HF_HUB_OFFLINE is set; unset it"):
        find_file("me/y")


def test_looking_at_a_repository_does_not_move_what_is_known_offline(hub, offline):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    path = find_file("me/x")
    hub.commit("me/x", {"a.safetensors": adapter_bytes(7)})
    forget()
    assert len(list_adapters("me/x")) == 1
    offline()
    assert find_file("me/x") == path


def test_the_cache_stands_in_for_a_hub_that_is_down(hub, caplog):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    path = find_file("me/x")
    forget()
    hub.fault("/api/", 503)
    assert find_file("me/x") == path
    assert "the Hub answers 503" in caplog.text
    assert sum("/api/" in request.path for request in hub.log) > 2


def test_a_catalogue_entry_on_the_hub_is_fetched_and_its_hash_verified(hub, monkeypatch):
    commit = hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    sha256 = hub.repos["me/x"].commits[commit]["a.safetensors"].sha256
    pin = {"repo": "me/x", "revision": commit, "file": "a.safetensors"}
    entries = {
        "good": CatalogEntry("good", "T", "sd1", "x", **pin, sha256=sha256),
        "bad": CatalogEntry("bad", "T", "sd1", "x", **pin, sha256="0" * 64),
    }
    monkeypatch.setattr("texforce_hub.hub.catalog._read_catalog", lambda _: entries)
    assert find_file("good:0.5").read_bytes() == adapter_bytes()
    with pytest.raises(HubError, match="the catalogue's 000000000000…; not used"):
        find_file("bad")


def test_a_pickle_from_the_hub_is_read_only_with_leave(hub, tmp_path):
    hub.commit("me/old", {"pytorch_lora_weights.bin": pickle_bytes(tmp_path)})
    with pytest.raises(FileError, match="pickle"):
        read_adapter("me/old")
    assert len(read_adapter("me/old", allow_pickle=True).layers) == 1


def test_a_shard_is_fetched_with_its_set_and_a_models_shards_are_left_where_they_are(hub):
    names = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files = {name: adapter_bytes(i, 1, LAYER.replace("{}", str(i))) for i, name in enumerate(names)}
    hub.commit("me/shards", files)
    assert len(read_adapter("me/shards").layers) == 2
    hub.commit("you/shards", files)
    assert len(read_adapter(f"you/shards/{names[1]}").layers) == 2
    model = {f"model-0000{i}-of-00002.safetensors": save({f"conv_in.{i}": torch.ones(9_000)}) for i in (1, 2)}
    hub.commit("me/model", model)
    hub.log.clear()
    with pytest.raises(RefError, match="holds no adapter file"):
        read_adapter("me/model")
    assert not any(request.sent > 40_000 for request in hub.log)
