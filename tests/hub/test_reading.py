"""What is read from the Hub, and every way in which that can fail."""

import json
import threading

import pytest
from huggingface_hub import constants

from tests.support.hub_session import KOHYA, LAYER, adapter_bytes, find_file, kohya_bytes
from texforce_hub.errors import FileError, HubError, RefError
from texforce_hub.hub.huggingface import ranges
from texforce_hub.hub.huggingface.fetch import fetch_file
from texforce_hub.hub.huggingface.ranges import read_remote_header
from texforce_hub.hub.huggingface.repository import open_repository

REFUSALS = [
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
]


@pytest.mark.parametrize(
    ("route", "status", "headers", "phrase"),
    [
        *(("/api/models", *refusal) for refusal in REFUSALS),
        *(("/resolve/", *refusal) for refusal in REFUSALS if not refusal[2].startswith(("no such rev", "the answer"))),
    ],
)
def test_every_refusal_is_one_line_with_the_way_out(hub, route, status, headers, phrase):
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


def test_a_password_in_the_endpoint_is_in_no_error(hub, monkeypatch, caplog):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    hub.fault("/api/", 503)
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("://", "://somebody:word@"))
    with pytest.raises(HubError, match="answers 503") as caught:
        find_file("hf://me/x")
    monkeypatch.setenv("HF_ENDPOINT", "http://somebody:word@127.0.0.1:9")
    with pytest.raises(HubError, match=r"http://\*\*\*@127\.0\.0\.1:9 cannot be reached") as unreachable:
        find_file("hf://me/x")
    for text in (str(caught.value), str(unreachable.value), caplog.text):
        assert "word@" not in text


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
def test_names_that_would_leave_the_cache_are_left_out(hub, tmp_path, caplog, name):
    hub.commit("me/x", {"a.safetensors": adapter_bytes(), "what? a: b*.txt": b""})
    hub.listed["a.safetensors"] = ("rfilename", name)
    with pytest.raises(RefError, match=r"me/x@\w{12}: holds no adapter file; it holds what\? a: b\*\.txt"):
        find_file("hf://me/x")
    assert f"lists a file {name!r}, which could lie outside the cache; left out" in caplog.text
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
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"] == []


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


def test_a_transfer_that_breaks_off_leaves_nothing_that_could_be_taken_for_the_file(hub, tmp_path):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    hub.cut = 100
    with pytest.raises(HubError, match=r"a\.safetensors: cannot be fetched: 100 bytes came of 25120") as caught:
        find_file("me/x/a.safetensors")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    hub.cut = None
    assert find_file("me/x/a.safetensors").read_bytes() == adapter_bytes()


def test_a_damaged_copy_in_the_cache_is_not_used(hub):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    path = find_file("me/x")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(HubError, match=r"100 bytes in the cache, \d+ on the Hub; delete .* and fetch it again"):
        find_file("me/x/a.safetensors")


def test_a_header_costs_little_however_large_the_file(hub, tmp_path):
    size = 3 << 30
    rows = size // 4 // 768
    entry = {"dtype": "F32", "shape": [rows, 768], "data_offsets": [0, rows * 768 * 4]}
    head = json.dumps({f"{LAYER.format(0)}.lora_A.weight": entry}).encode()
    big = tmp_path / "big.safetensors"
    with big.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + rows * 768 * 4)
    hub.commit("me/big", {"big.safetensors": big})
    header = read_remote_header(open_repository("me/big").file("big.safetensors")).header
    assert header.tensors[f"{LAYER.format(0)}.lora_A.weight"].shape == (rows, 768)
    assert [request.method for request in hub.log] == ["GET", "HEAD", "GET"]
    assert hub.sent < 1_000_000
    assert not (tmp_path / "cache").exists()


def open_kohya(hub, layers=12, **flags):
    content = kohya_bytes(layers)
    hub.commit("me/kohya", {"a.safetensors": content})
    hub.log.clear()
    return read_remote_header(open_repository("me/kohya").file("a.safetensors"), **flags), content


def test_a_small_file_is_read_in_one_request(hub):
    found, _ = open_kohya(hub)
    assert found.header.scalars == {f"{KOHYA.format(i)}.alpha": 4.0 for i in range(12)}
    assert (found.read, found.unread) == (12, 0)
    assert [request.method for request in hub.log] == ["GET", "HEAD", "GET"]


def test_of_a_header_longer_than_the_first_request_only_the_rest_is_asked_for(hub, monkeypatch):
    monkeypatch.setattr(ranges, "_FIRST", 500)
    found, content = open_kohya(hub, numbers=False)
    header = 8 + int.from_bytes(content[:8], "little")
    assert len(found.header.tensors) == 36 - found.unread
    assert [request.sent for request in hub.log if "/large/" in request.path and request.method == "GET"] == [
        500,
        header - 500,
    ]


def test_scattered_numbers_are_collected_by_ranges(hub, monkeypatch):
    monkeypatch.setattr(ranges, "_WHOLE", 0)
    found, content = open_kohya(hub)
    assert found.header.scalars == {f"{KOHYA.format(i)}.alpha": 4.0 for i in range(12)}
    assert hub.sent < len(content)  # gaps are fetched rather than asked around: few requests for any file
    assert hub.requests <= 6


def test_numbers_are_left_alone_that_nobody_wants(hub):
    found, _ = open_kohya(hub, numbers=False)
    assert (len(hub.log), found.read + found.unread) == (3, 12)
    assert found.unread > 0
    assert len(found.header.tensors) == 36 - found.unread
    assert hub.sent < 110_000


@pytest.mark.parametrize("bytes_allowed", [3, 500_000, 8_000_000])
def test_numbers_that_lie_scattered_cost_few_requests(hub, monkeypatch, bytes_allowed):
    for name, value in {"_WHOLE": 0, "_MOST": 4, "_MOST_BYTES": bytes_allowed}.items():
        monkeypatch.setattr(ranges, name, value)
    found, content = open_kohya(hub, layers=40)
    assert 0 < found.read <= 40
    assert (found.unread == 0) == (bytes_allowed > len(content))
    assert len(hub.log) <= 2 + 1 + 4
    assert set(found.header.scalars.values()) == {4.0}


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
