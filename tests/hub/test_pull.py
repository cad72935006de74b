"""Adapters are fetched whole, pinned and checked; a lock makes them mean the same bytes later."""

import pytest

from tests.support.hub_session import adapter_bytes, find_file, forget, peft_files
from texforce_hub.errors import ConfigError, FileError, HubError, RefError
from texforce_hub.hub.lock import Lock, Locked, use_lock
from texforce_hub.hub.pull import fetch_adapter


@pytest.fixture
def styles(hub):
    hub.commit("me/styles", {"ink.safetensors": adapter_bytes(1), "README.md": b"x"}, tag="v1")
    return hub


def asked(simulator):
    return [(r.method, r.path.partition("?")[0].split("/")[1]) for r in simulator.log]


def test_a_pull_costs_one_listing_and_one_request_a_file_and_its_storage(styles):
    found = fetch_adapter("me/styles/ink.safetensors")
    assert asked(styles) == [("GET", "api"), ("GET", "me"), ("GET", "large")]
    assert found.path.read_bytes() == adapter_bytes(1)
    assert [(file.name, file.was_here) for file in found.files] == [("ink.safetensors", False)]
    styles.log.clear()
    again = fetch_adapter("me/styles/ink.safetensors")
    assert (again.missing, len(styles.log)) == (0, 0)


def test_a_peft_adapter_comes_with_its_config(hub):
    hub.commit("me/peft", peft_files())
    found = fetch_adapter("me/peft", output="here")
    assert sorted(path.name for path in found.path.parent.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert len(hub.log) == 4


def test_a_dry_run_fetches_nothing(styles, tmp_path):
    found = fetch_adapter("me/styles", dry_run=True, lock="adapters.lock", output="here")
    assert (found.path, found.missing) == (None, len(adapter_bytes(1)))
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "adapters.lock").exists()


def test_what_is_here_or_not_definite_is_not_pulled(styles, tmp_path):
    with pytest.raises(RefError, match="is here already; pull is for what is on the Hub"):
        fetch_adapter(str(tmp_path))
    styles.commit("me/styles", {"oil.safetensors": adapter_bytes(2)})
    forget()
    with pytest.raises(RefError, match="holds 2 adapters"):
        fetch_adapter("me/styles")
    assert len(fetch_adapter("me/styles", every=True).files) == 2


def test_a_folder_with_other_files_of_the_name_is_left_alone(styles, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "ink.safetensors").write_bytes(b"mine")
    with pytest.raises(FileError, match="another file is there already"):
        fetch_adapter("me/styles", output="here")
    assert (tmp_path / "here" / "ink.safetensors").read_bytes() == b"mine"


def test_a_lock_keeps_a_branch_where_it_was(styles):
    old = fetch_adapter("me/styles", lock="adapters.lock")
    styles.commit("me/styles", {"ink.safetensors": adapter_bytes(2)})
    forget()
    with use_lock("adapters.lock"):
        assert find_file("me/styles").read_bytes() == adapter_bytes(1)
        assert find_file("me/styles/ink.safetensors").read_bytes() == adapter_bytes(1)
        with pytest.raises(HubError, match=r"me/other: is not in adapters\.lock; 'texforce-hub pull me/other --lock"):
            find_file("hf://me/other")
    assert find_file("me/styles").read_bytes() == adapter_bytes(2)
    assert Lock.read("adapters.lock").entries == (Locked("me/styles", "main", old.commit, {"ink.safetensors": SHA}),)


SHA = "0" * 64


@pytest.fixture(autouse=True)
def known_hash():
    import hashlib

    global SHA
    SHA = hashlib.sha256(adapter_bytes(1)).hexdigest()


def test_a_locked_job_runs_without_a_network(styles, offline):
    fetch_adapter("me/styles@v1", lock="adapters.lock")
    offline()
    with use_lock("adapters.lock"):
        assert find_file("me/styles@v1").read_bytes() == adapter_bytes(1)


def test_bytes_that_are_not_those_of_the_lock_are_not_used(styles):
    fetch_adapter("me/styles", lock="adapters.lock")
    forget()
    path = find_file("me/styles")
    path.write_bytes(adapter_bytes(2))
    with use_lock("adapters.lock"), pytest.raises(HubError, match=r"its SHA-256 is \w{12}…, that in adapters\.lock"):
        find_file("me/styles")


def test_a_file_that_was_not_pulled_is_not_in_the_lock(styles):
    styles.commit("me/styles", {"oil.safetensors": adapter_bytes(2)})
    fetch_adapter("me/styles/ink.safetensors", lock="adapters.lock")
    with use_lock("adapters.lock"), pytest.raises(HubError, match=r"oil\.safetensors: is not in adapters\.lock"):
        find_file("me/styles/oil.safetensors")


def test_a_second_pull_adds_to_the_lock_and_another_commit_replaces(styles):
    fetch_adapter("me/styles", lock="adapters.lock")
    styles.commit("me/other", {"a.safetensors": adapter_bytes(3)})
    fetch_adapter("me/other", lock="adapters.lock")
    assert [entry.repo for entry in Lock.read("adapters.lock").entries] == ["me/other", "me/styles"]
    new = styles.commit("me/styles", {"ink.safetensors": adapter_bytes(2)})
    forget()
    fetch_adapter("me/styles", lock="adapters.lock")
    assert [entry.commit for entry in Lock.read("adapters.lock").entries if entry.repo == "me/styles"] == [new]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "format = 2\n",
        "format = 1\nadapter = 3\n",
        'format = 1\n[[adapter]]\nrepo = "a/b"\n',
        'format = 1\n[[adapter]]\nrepo = "a/b"\nrevision = "main"\ncommit = "12"\n',
        f'format = 1\n[[adapter]]\nrepo = "a/b"\nrevision = "main"\ncommit = "{"a" * 40}"\nfiles = {{ a = "b" }}\n',
        "no toml at all",
    ],
)
def test_a_lock_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "adapters.lock").write_text(text)
    with pytest.raises(ConfigError, match="lock"), use_lock(tmp_path / "adapters.lock"):
        pass


def test_a_lock_reads_as_it_was_written(tmp_path):
    entry = Locked('a/"b"', "v 1", "a" * 40, {"x\ny.safetensors": "b" * 64})
    Lock(tmp_path / "l", (entry,)).write()
    assert Lock.read(tmp_path / "l").entries == (entry,)


def test_a_catalogue_entry_without_a_commit_is_looked_up_once(styles, monkeypatch, tmp_path):
    from texforce_hub.hub import find, remote
    from texforce_hub.hub.catalog import CatalogEntry

    entry = CatalogEntry("ink", "Ink", "sd1", "mit", repo="me/styles", file="ink.safetensors")
    for module in (find, remote):
        monkeypatch.setattr(module, "read_catalog", lambda: {"ink": entry})
    assert find_file("ink").read_bytes() == adapter_bytes(1)
    styles.commit("me/styles", {"ink.safetensors": adapter_bytes(2)})
    forget()
    assert find_file("ink").read_bytes() == adapter_bytes(1)
    assert (tmp_path / "home" / "texforce-hub" / "catalogue.lock").exists()


def test_a_download_that_broke_off_is_gone_on_with(styles, tmp_path):
    import hashlib

    aside = tmp_path / "cache" / "models--me--styles" / "blobs" / (hashlib.sha256(adapter_bytes(1)).hexdigest())
    aside = aside.with_name(aside.name + ".incomplete")
    aside.parent.mkdir(parents=True)
    aside.write_bytes(adapter_bytes(1)[:20_000])
    assert fetch_adapter("me/styles/ink.safetensors").path.read_bytes() == adapter_bytes(1)
    assert [r.sent for r in styles.log if r.path.startswith("/large")] == [len(adapter_bytes(1)) - 20_000]
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_commands_take_the_lock(styles, offline):
    from typer.testing import CliRunner

    from texforce_hub.cli import app
    from texforce_hub.hub.read import read_adapter

    run = CliRunner().invoke
    assert run(app, ["pull", "me/styles@v1", "--lock", "adapters.lock"]).exit_code == 0
    old = styles.repos["me/styles"].refs["v1"]
    commit = styles.commit("me/styles", {"ink.safetensors": adapter_bytes(2)}, tag="v1")
    forget()
    merged = ["merge", "me/styles@v1:1", "--lock", "adapters.lock", "--output", "merged.safetensors"]
    assert run(app, merged).exit_code == 0
    name = next(iter(read_adapter("merged.safetensors").layers))
    merged_delta = read_adapter("merged.safetensors").delta(name)
    assert merged_delta.allclose(read_adapter(str(fetch_adapter(f"me/styles@{old}").path)).delta(name), atol=1e-4)
    assert not merged_delta.allclose(read_adapter(f"me/styles@{commit}").delta(name), atol=1e-2)
    offline()
    result = run(
        app,
        ["apply", "--base", "shapes", "--adapter", "me/other", "--lock", "adapters.lock", "-o", "p", "--prompt", "x"],
    )
    assert "is not in adapters.lock" in str(result.exception)
