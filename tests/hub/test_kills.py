"""Killed and cut off in the middle: the Hub has the old commit or the new one, the cache is whole."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hub_session import adapter_bytes
from texforce_hub.errors import HubError
from texforce_hub.hub.pull import fetch_adapter
from texforce_hub.hub.push import push_adapter

ROOT = Path(__file__).parents[2]
PUSHED = {"README.md", "adapter_config.json", "mine-kohya.safetensors", "pytorch_lora_weights.safetensors"}
LONG = pytest.mark.campaign


def killed_at(simulator, number, tmp_path, source):
    """Run a Python of its own, and kill it when the Hub gets its request of this number."""
    environment = os.environ | {
        "HF_ENDPOINT": simulator.url,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
    }
    environment |= {"HF_TOKEN": simulator.token, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    process = subprocess.Popen([sys.executable, "-c", source], env=environment, cwd=tmp_path)
    begun = simulator.requests
    simulator.watch = lambda count: os.kill(process.pid, signal.SIGKILL) if count - begun == number else None
    process.wait()
    simulator.watch = lambda count: None
    return process.returncode


@pytest.mark.parametrize("number", [pytest.param(n, marks=[] if n in (9, 15) else LONG) for n in range(5, 16)])
def test_a_push_that_is_killed_leaves_the_old_commit_or_the_new_and_goes_on(hub, monkeypatch, tmp_path, number):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.create("alice/mine")
    old = dict(hub.repos["alice/mine"].refs)
    (tmp_path / "mine.safetensors").write_bytes(adapter_bytes())
    source = (
        "from texforce_hub import push_adapter; "
        "push_adapter('mine.safetensors', 'alice/mine', base='a/b', license='mit')"
    )
    killed_at(hub, number, tmp_path, source)
    assert hub.repos["alice/mine"].refs == old or set(hub.files("alice/mine")) >= PUSHED
    push_adapter("mine.safetensors", "alice/mine", base="a/b", license="mit")
    assert set(hub.files("alice/mine")) >= PUSHED
    assert len(hub.repos["alice/mine"].messages) == 1
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("number", [pytest.param(n, marks=[] if n == 3 else LONG) for n in (1, 2, 3)])
def test_a_pull_that_is_killed_leaves_a_whole_cache_and_goes_on(hub, tmp_path, number):
    hub.commit("me/x", {"pytorch_lora_weights.safetensors": adapter_bytes()})
    killed_at(hub, number, tmp_path, "from texforce_hub import fetch_adapter; fetch_adapter('me/x')")
    assert not [p for p in (tmp_path / "cache").rglob("*.safetensors") if p.read_bytes() != adapter_bytes()]
    assert fetch_adapter("me/x").path.read_bytes() == adapter_bytes()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix in (".part", ".incomplete")]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_an_upload_that_is_cut_anywhere_changes_nothing_and_the_next_goes_on(hub, monkeypatch, tmp_path, share):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    (tmp_path / "mine.safetensors").write_bytes(adapter_bytes())
    hub.create("alice/mine")
    old = dict(hub.repos["alice/mine"].refs)
    hub.cut_upload = int(share * 134_000)
    with pytest.raises(HubError) as caught:
        push_adapter("mine.safetensors", "alice/mine", base="a/b", license="mit")
    assert str(caught.value).isprintable()
    assert hub.repos["alice/mine"].refs == old
    hub.cut_upload = None
    push_adapter("mine.safetensors", "alice/mine", base="a/b", license="mit")
    assert set(hub.files("alice/mine")) >= PUSHED
