"""The Hub as a place to read from: commits, listings, headers by ranges, the cache, and every way to fail."""

import json
import logging
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save, save_file

from tests.hub_simulator import HubSimulator
from texforce_hub import locate
from texforce_hub.catalog import Entry
from texforce_hub.errors import FileError, HubError, RefError
from texforce_hub.hub import fetch_file, open_repository, read_remote_header, repository
from texforce_hub.locate import find_file, find_files, find_local, find_place, list_adapters, pin_source
from texforce_hub.sources import read_adapter

LAYER = "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj"
KOHYA = "lora_te_text_model_encoder_layers_{}_self_attn_q_proj"


def adapter_bytes(seed=0, layers=2, names=LAYER, rank=2):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(layers):
        layer = names.format(i)
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, 768, generator=generator)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(768, rank, generator=generator)
    return save(tensors)


def kohya_bytes(layers, alpha=4.0, rank=8):
    tensors = {}
    for i in range(layers):
        layer = KOHYA.format(i)
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
        tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, 768)
        tensors[f"{layer}.lora_up.weight"] = torch.randn(768, rank)
    return save(tensors)


def pickle_bytes(tmp_path):
    layer = LAYER.format(0)
    torch.save(
        {f"{layer}.lora_A.weight": torch.ones(2, 768), f"{layer}.lora_B.weight": torch.ones(768, 2)}, tmp_path / "p.bin"
    )
    return (tmp_path / "p.bin").read_bytes()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A simulated Hub that this process reads from, an empty cache, and no waiting between retries."""
    with HubSimulator() as simulator:
        monkeypatch.setenv("HF_ENDPOINT", simulator.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        quick = SimpleNamespace(**{name: getattr(time, name) for name in ("time", "perf_counter", "monotonic")})
        quick.sleep = lambda _: None
        monkeypatch.setattr("huggingface_hub.utils._http.time", quick)
        monkeypatch.chdir(tmp_path)
        forget()
        yield simulator
        forget()


def forget():
    """As a new process: no revision is resolved yet."""
    repository._open.cache_clear()
    locate._say_shadow.cache_clear()


@pytest.fixture
def offline(monkeypatch):
    def go():
        forget()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return go


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
    place = find_place("me/x")
    assert [path.relative_to(place).as_posix() for path in find_files("me/x")] == [
        "a.safetensors",
        "steps/10/adapter_model.safetensors",
    ]
    assert find_place("me/x/steps") == place / "steps"
    assert find_place("me/x/a.safetensors") == place / "a.safetensors"


def test_a_peft_folder_comes_with_its_config(hub):
    peft = {f"base_model.model.{n}.weight": t for n, t in _peft_halves().items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 16}
    files = {"adapter_model.safetensors": save(peft), "adapter_config.json": json.dumps(config).encode()}
    hub.commit("me/peft", files)
    adapter = read_adapter("me/peft")
    assert {getattr(layer, "scale", None) for layer in adapter.layers.values()} == {8.0}
    assert (find_file("me/peft").parent / "adapter_config.json").is_file()


def _peft_halves():
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    return {f"{layer}.lora_A": torch.ones(2, 768), f"{layer}.lora_B": torch.ones(768, 2)}


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
    assert "only what the cache holds of me/x" in caplog.text
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


@pytest.mark.parametrize(
    ("status", "headers", "phrase"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, r"no such repository on the Hub, or a private one.*hf auth login"),
        (403, {"X-Error-Code": "GatedRepo"}, r"gated repository; ask for access.*hf auth login"),
        (404, {"X-Error-Code": "RevisionNotFound"}, r"no such revision; give a branch, a tag or a commit"),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, r"closed this repository"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, r"does not accept the token"),
        (403, {}, r"token may not read this"),
        (418, {"X-Error-Message": "a teapot"}, r"answers 418: .*teapot"),
        (429, {}, r"answers 429, too many requests; wait"),
        (500, {}, r"answers 500, again and again; try later"),
        (200, {}, r"the answer names no commit but None; HF_ENDPOINT is no Hub"),
    ],
)
@pytest.mark.parametrize("route", ["/api/models", "/resolve/"])
def test_every_refusal_is_one_line_with_the_way_out(hub, status, headers, phrase, route):
    if route == "/resolve/" and (status == 200 or "RevisionNotFound" in headers.values()):
        pytest.skip("only the listing answers so")
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    hub.fault(route, status, headers=headers)
    with pytest.raises(HubError, match=phrase) as caught:
        find_file("hf://me/x/a.safetensors")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("me/x")


def test_an_answer_that_comes_after_a_retry_is_as_good(hub):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    for route in ("/api/models", "/resolve/", "/large/"):
        hub.fault(route, 429, times=1)
    hub.fault("/resolve/", 503, times=1)
    assert find_file("me/x/a.safetensors").read_bytes() == adapter_bytes()


def test_a_file_that_vanished_says_so(hub):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    hub.fault("/resolve/", 404, headers={"X-Error-Code": "EntryNotFound"})
    with pytest.raises(HubError, match=r"me/x@\w{12}/a\.safetensors: the Hub has no such file"):
        find_file("me/x/a.safetensors")


def test_a_silent_or_absent_hub_ends_in_one_line(hub, monkeypatch):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.fault("/api/", 200, wait=0.6)
    with pytest.raises(HubError, match=r"me/x: the Hub did not answer in time.*HF_HUB_ETAG_TIMEOUT"):
        find_file("hf://me/x")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"me/x: http://127\.0\.0\.1:9 cannot be reached .*check the network"):
        find_file("hf://me/x")


def test_private_repositories_open_with_the_token_which_goes_to_the_hub_alone(hub, monkeypatch):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()}, private=True)
    with pytest.raises(HubError, match="or a private one"):
        find_file("me/x")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.log.clear()
    find_file("me/x")
    assert {request.authorized for request in hub.log if "/large/" not in request.path} == {True}
    assert {request.authorized for request in hub.log if "/large/" in request.path} == {False}


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\evil", "C:evil", "a//b", "x\n", ""])
def test_names_that_would_leave_the_cache_are_refused(hub, tmp_path, name):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    hub.listed["a.safetensors"] = ("rfilename", name)
    with pytest.raises(HubError, match="which would lie outside the cache"):
        find_file("hf://me/x")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "claim",
    [
        {"X-Repo-Commit": "../../evil"},
        {"X-Repo-Commit": "0" * 40},
        {"X-Linked-Etag": '"../../../evil"'},
        {"X-Linked-Size": "12"},
    ],
)
def test_answers_that_contradict_the_listing_are_refused_before_a_byte_is_written(hub, tmp_path, claim):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    hub.claimed = claim
    with pytest.raises(HubError, match=r"a\.safetensors: cannot be fetched: (the answer is of commit|listed with)"):
        find_file("me/x/a.safetensors")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("value", [-1, "12", None, True])
def test_sizes_that_are_none_are_refused(hub, value):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    hub.listed["a.safetensors"] = ("size", value)
    with pytest.raises(HubError, match="is listed with"):
        find_file("hf://me/x")


def test_bytes_of_another_hash_are_taken_out_of_the_cache_again(hub, tmp_path):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    hub.listed["a.safetensors"] = ("sha256", "0" * 64)
    with pytest.raises(HubError, match=r"fetched with SHA-256 \w{12}…, listed with 000000000000…; try again"):
        find_file("me/x/a.safetensors")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 10_000]


def test_a_damaged_copy_in_the_cache_is_not_used(hub):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    path = find_file("me/x")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(HubError, match=r"100 bytes in the cache, \d+ on the Hub; delete .* and fetch it again"):
        find_file("me/x/a.safetensors")


def test_a_catalogue_entry_on_the_hub_is_fetched_and_its_hash_verified(hub, monkeypatch):
    commit = hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    sha256 = hub.repos["me/x"].commits[commit]["a.safetensors"].sha256
    pin = {"repo": "me/x", "revision": commit, "file": "a.safetensors"}
    entries = {
        "good": Entry("good", "T", "sd1", "x", **pin, sha256=sha256),
        "bad": Entry("bad", "T", "sd1", "x", **pin, sha256="0" * 64),
    }
    monkeypatch.setattr(locate, "read_catalog", lambda: entries)
    assert find_file("good:0.5").read_bytes() == adapter_bytes()
    with pytest.raises(HubError, match="the catalogue's 000000000000…; not used"):
        find_file("bad")


def test_a_pickle_from_the_hub_is_read_only_with_leave(hub, tmp_path):
    hub.commit("me/old", {"pytorch_lora_weights.bin": pickle_bytes(tmp_path)})
    with pytest.raises(FileError, match="pickle"):
        read_adapter("me/old")
    assert len(read_adapter("me/old", allow_pickle=True).layers) == 1


def test_a_header_costs_little_however_large_the_file(hub, tmp_path):
    save_file({f"{LAYER.format(0)}.lora_A.weight": torch.ones(2, 768)}, tmp_path / "small")
    size = 3 << 30
    rows = size // 4 // 768
    entry = {"dtype": "F32", "shape": [rows, 768], "data_offsets": [0, rows * 768 * 4]}
    head = json.dumps({f"{LAYER.format(0)}.lora_A.weight": entry}).encode()
    big = tmp_path / "big.safetensors"
    with big.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + rows * 768 * 4)
    hub.commit("me/big", {"big.safetensors": big})
    header = read_remote_header(open_repository("me/big").file("big.safetensors"))
    assert header.tensors[f"{LAYER.format(0)}.lora_A.weight"].shape == (rows, 768)
    assert [request.method for request in hub.log] == ["GET", "HEAD", "GET"]
    assert hub.sent < 1_000_000
    assert not (tmp_path / "cache").exists()


def test_scattered_numbers_are_collected_by_ranges(hub):
    content = kohya_bytes(12)
    hub.commit("me/kohya", {"a.safetensors": content})
    header = read_remote_header(open_repository("me/kohya").file("a.safetensors"))
    assert header.scalars == {f"{KOHYA.format(i)}.alpha": 4.0 for i in range(12)}
    assert hub.sent < len(content) / 2
    hub.log.clear()
    assert not read_remote_header(open_repository("me/kohya").file("a.safetensors"), numbers=False).scalars
    assert len(hub.log) == 2


def test_a_hub_without_ranges_is_not_asked_for_whole_files(hub):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    hub.ranges = False
    with pytest.raises(HubError, match="sends the whole file when asked for a part of it"):
        read_remote_header(open_repository("me/x").file("a.safetensors"))


def test_a_damaged_header_is_named_by_its_file(hub):
    hub.commit("me/x", {"a.safetensors": b"\xff" * 100})
    with pytest.raises(FileError, match=r"me/x@\w{12}/a\.safetensors: not a safetensors file"):
        read_remote_header(open_repository("me/x").file("a.safetensors"))


def test_many_threads_fetch_one_file_once(hub):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    file = open_repository("me/x").file("a.safetensors")
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch_file(file))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert sum(request.method == "GET" and "/large/" in request.path for request in hub.log) == 1


def test_a_shard_is_fetched_with_its_set_and_a_models_shards_are_left_where_they_are(hub):
    names = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files = {name: adapter_bytes(i, 1, LAYER.replace("{}", f"{i}{{}}")) for i, name in enumerate(names)}
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
