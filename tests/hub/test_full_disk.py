"""A full disk during push or pull, and jobs in processes of their own: offline by a lock, and through ``hf``."""

import errno
import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub.test_push import SAID
from tests.support.hub_session import adapter_bytes, forget
from texforce_hub.errors import FileError, TexForceHubError
from texforce_hub.hub.pull import fetch_adapter
from texforce_hub.hub.push import push_adapter


@contextmanager
def full_disk(most):
    """Files that grow beyond ``most`` bytes fail, as they do where a disk is full."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_pull_onto_a_full_disk_is_one_line_and_the_next_one_succeeds(hub, tmp_path):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    with full_disk(300), pytest.raises(TexForceHubError) as caught:
        fetch_adapter("me/x", output=tmp_path / "here", lock=tmp_path / "adapters.lock")
    assert "\n" not in str(caught.value)
    assert os.strerror(errno.EFBIG) in str(caught.value)
    left = files_in(tmp_path)  # what came is gone on with; it is no file of the adapter's
    assert all(name.startswith("cache/") and name.endswith((".lock", ".incomplete")) for name in left)
    forget()
    done = fetch_adapter("me/x", output=tmp_path / "here")
    assert done.path is not None
    assert done.path.read_bytes() == adapter_bytes()
    assert not [name for name in files_in(tmp_path) if name.endswith(".incomplete")]


def test_a_push_from_a_full_disk_is_one_line_and_publishes_nothing(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "mine.safetensors").write_bytes(adapter_bytes())
    hub.log.clear()
    with full_disk(300), pytest.raises(FileError) as caught:
        push_adapter(tmp_path / "mine.safetensors", "alice/mine", **SAID)
    assert "\n" not in str(caught.value)
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert not hub.log  # all is written before anything is asked
    assert files_in(tmp_path) == ["mine.safetensors"]


def test_a_locked_job_runs_in_a_process_of_its_own_without_a_network(hub, tmp_path):
    commit = hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    lock = tmp_path / "adapters.lock"
    fetch_adapter("me/x", lock=lock)
    hub.commit("me/x", {"a.safetensors": adapter_bytes(7)})  # the branch goes on
    hub.log.clear()
    run = in_a_process(
        "merge", "me/x:0.5", "--lock", str(lock), "-o", str(tmp_path / "half.safetensors"), "--json",
        cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HUB_CACHE=constants.HF_HUB_CACHE, HF_ENDPOINT="http://127.0.0.1:9",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["output"] == str(tmp_path / "half.safetensors")
    assert commit in run_metadata(tmp_path / "half.safetensors")
    assert not hub.log


def run_metadata(file):
    from texforce_hub.hub.inspect import inspect_file

    return json.dumps(dict(inspect_file(file, hashed=False).metadata))


def in_a_process(*arguments, cwd, program=(sys.executable, "-m", "texforce_hub"), **more):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **more}
    return subprocess.run([*program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_hf_runs_the_commands_as_its_extension(tmp_path):
    """What ``hf extensions install`` leaves: a manifest, and beside it the console script that ``pip`` makes."""
    hf = Path(sys.executable).with_name("hf")
    if not hf.exists():
        pytest.skip("no hf beside this Python")
    folder = tmp_path / ".local/share/hf/extensions/hf-texforce"
    folder.mkdir(parents=True)
    script = folder / "hf-texforce"
    script.write_text(f"#!{sys.executable}\nfrom texforce_hub.cli import main\nmain()\n")
    script.chmod(0o755)
    manifest = {"owner": "texforce", "repo": "hf-texforce", "repo_id": "texforce/hf-texforce", "type": "python"}
    manifest |= {"short_name": "texforce", "executable_path": str(script), "installed_at": "2026-01-01T00:00:00+00:00"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run = in_a_process(
        "texforce", "push", "--help", cwd=tmp_path, program=[str(hf)], HOME=str(tmp_path), HF_HUB_OFFLINE="1"
    )
    assert run.returncode == 0, run.stderr
    assert "Publish an adapter" in run.stdout
