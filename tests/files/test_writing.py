"""What may be written over, where links lead, what killed writers leave, and what a file of tensors is called."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.pipelines_tiny import tiny_pipeline
from texforce_hub.errors import FileError
from texforce_hub.files.leftovers import name_part, remove_leftovers
from texforce_hub.files.tensors import read_tensors
from texforce_hub.files.writing import write_tensors, writing
from texforce_hub.pipelines.save_checkpoint import save_checkpoint, save_text_encoder

ROOT = Path(__file__).parents[2]


def write(path, text="new"):
    with writing(path) as part:
        part.write_text(text)


def test_a_link_stays_a_link_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "store").mkdir()
    real, link, chain = tmp_path / "store" / "real.txt", tmp_path / "link.txt", tmp_path / "chain.txt"
    real.write_text("old")
    link.symlink_to("store/real.txt")
    chain.symlink_to(link)
    write(chain)
    assert (chain.readlink(), link.readlink()) == (link, Path("store/real.txt"))
    assert real.read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["chain.txt", "link.txt", "real.txt", "store"]


def test_a_link_to_what_is_not_there_yet_is_filled(tmp_path):
    link = tmp_path / "link.txt"
    link.symlink_to("later/real.txt")
    write(link)
    assert link.is_symlink()
    assert (tmp_path / "later" / "real.txt").read_text() == "new"


def test_links_in_a_circle_are_one_line(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(FileError):
        write(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_there_and_is_no_file_is_never_replaced(tmp_path, kind, linked):
    path = tmp_path / "there"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/null")
    target = path
    if linked:
        target = tmp_path / "link"
        target.symlink_to(path)
    mode, before = path.stat().st_mode, sorted(tmp_path.iterdir())
    with pytest.raises(FileError, match=r"is a pipe, a socket or a device|is a folder that exists"):
        write_tensors(target, {"a": torch.ones(1)})
    assert path.stat().st_mode == mode
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin", ".pth", ".BIN"])
def test_tensors_are_never_written_under_a_pickle_s_name(tmp_path, ending):
    pipe = tiny_pipeline("sd1")
    for save in (
        lambda path: write_tensors(path, {"a": torch.ones(1)}),
        lambda path: save_checkpoint(pipe, path),
        lambda path: save_text_encoder(pipe, path),
    ):
        with pytest.raises(FileError, match=r"pickles are not written; name a \.safetensors file"):
            save(tmp_path / f"x{ending}")
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_cut_by_bytes(tmp_path):
    for name in ("汉" * 84, "a" * 255, "🦊" * 63, "é" * 127):
        write(tmp_path / name)
        assert (tmp_path / name).read_text() == "new"
    with pytest.raises(FileError, match="cannot be written"):
        write(tmp_path / ("汉" * 90))
    assert len(list(tmp_path.iterdir())) == 4


def dead_process():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_the_next_write_removes_what_the_dead_have_left_and_nothing_else(tmp_path, monkeypatch):
    own = name_part("mine")
    monkeypatch.setattr(os, "getpid", dead_process)
    left = [name_part("a.safetensors"), name_part("folder")]
    monkeypatch.undo()
    strange = [".a.part", ".a.0a1b2c3d.part", ".a.ffffffff-1.0a1b2c3d.part", "a.part"]
    for name in (left[0], own, *strange):
        (tmp_path / name).write_text("")
    (tmp_path / left[1]).mkdir()
    (tmp_path / left[1] / "inner").write_text("")
    write(tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["x", own, *strange])


def test_no_folder_has_no_leftovers(tmp_path):
    remove_leftovers(tmp_path / "none")


HANG = """
import sys, time
from texforce_hub.files.writing import writing
with writing(sys.argv[1]) as part:
    part.mkdir()
    (part / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")
def test_what_a_killed_writer_leaves_is_gone_after_the_next_write(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HANG, str(tmp_path / "x")],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    write(tmp_path / "beside")
    assert len(list(tmp_path.iterdir())) == 2  # it lives and works on
    child.send_signal(signal.SIGKILL)
    child.wait()
    write(tmp_path / "y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "y"]


class FullDisk(Exception):
    """As libraries in Rust and C++ say it."""


@pytest.mark.parametrize("words", ["I/O error: No space left on device (os error 28)", "Disk quota exceeded"])
def test_a_full_disk_is_one_line_whoever_says_it(tmp_path, words):
    def fill():
        with writing(tmp_path / "x") as part:
            part.mkdir()
            raise FullDisk(words)

    with pytest.raises(FileError, match="cannot be written: No space left"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_what_else_goes_wrong_stays_what_it_is(tmp_path):
    def fail():
        with writing(tmp_path / "x"):
            raise FullDisk("another trouble")

    with pytest.raises(FullDisk, match="another trouble"):
        fail()


def test_the_same_tensors_are_the_same_bytes_through_a_link(tmp_path):
    (tmp_path / "link.safetensors").symlink_to("real.safetensors")
    write_tensors(tmp_path / "link.safetensors", {"a": torch.ones(2)})
    assert read_tensors(tmp_path / "real.safetensors")[1]["a"].tolist() == [1, 1]
