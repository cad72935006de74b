"""Tensor files are copied out checked, and appear whole or not at all."""

import itertools
import os
import pickle
import shutil
import signal
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file

from tests.support.kills import die_at, ends_with, in_child
from tests.support.steps import counted
from texforce_hub.errors import FileError
from texforce_hub.files.container import open_header
from texforce_hub.files.tensors import TensorFile, read_tensors
from texforce_hub.files.torch_dtypes import DTYPES
from texforce_hub.files.writing import write_tensors, writing


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_reads_back_bit_for_bit(tmp_path, dtype):
    data = torch.arange(1, 17, dtype=torch.uint8) % (2 if dtype == "BOOL" else 255)
    tensor = data.view(DTYPES[dtype]).reshape(1, -1)
    write_tensors(tmp_path / "x.safetensors", {"t": tensor, "empty": tensor[:0], "one": tensor[0, 0]}, {"k": "v"})
    header, tensors = read_tensors(tmp_path / "x.safetensors")
    assert header == open_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt", "k": "v"}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "t": (tensor.dtype, tuple(tensor.shape)),
        "empty": (tensor.dtype, (0, tensor.shape[1])),
        "one": (tensor.dtype, ()),
    }
    assert tensors["t"].view(torch.uint8).flatten().equal(data)


def test_pickles_need_permission_and_read_as_copies(tmp_path):
    content = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.nn.Parameter(torch.ones(2))}
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(FileError, match="allow_pickle=True"):
        read_tensors(tmp_path / "x.bin")
    _, tensors = read_tensors(tmp_path / "x.bin", allow_pickle=True)
    assert tensors["a"].equal(content["a"])
    assert tensors["a"].is_contiguous()
    assert not tensors["b"].requires_grad


def test_content_decides_what_a_file_is_and_the_lie_is_said(tmp_path, caplog):
    save_file({"a": torch.ones(2)}, tmp_path / "x.bin")
    assert read_tensors(tmp_path / "x.bin")[1]["a"].equal(torch.ones(2))
    assert "whatever its name says" in caplog.text


class Evil:
    def __reduce__(self):
        return (os.system, ("touch " + os.environ["EVIL_TARGET"],))


def test_a_pickle_that_runs_code_is_refused_in_our_words(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_TARGET", str(tmp_path / "owned"))
    torch.save({"a": Evil()}, tmp_path / "x.bin")
    with pytest.raises(FileError, match=r"asks for (posix|nt)\.system") as error:
        read_tensors(tmp_path / "x.bin", allow_pickle=True)
    assert not (tmp_path / "owned").exists()
    assert "weights_only" not in str(error.value)


def test_a_tensor_of_stride_zero_is_refused_before_it_is_touched(tmp_path):
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "x.bin")
    assert (tmp_path / "x.bin").stat().st_size < 4000
    with pytest.raises(FileError, match="claims 1000000000000 elements"):
        read_tensors(tmp_path / "x.bin", allow_pickle=True)


class Call:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


HOSTILE = {
    "a bytearray of a terabyte": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
    "a memo of a billion places": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a nested tuple as a key": b"\x80\x02}" + b")" + b"2\x86" * 60 + b"Ns.",
    "a list": pickle.dumps([1, 2]),
    "an ordered dictionary of keys": pickle.dumps(Call(OrderedDict, [(((),),), 1])),
    "nothing": b"\x80\x02.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_pickles_cost_neither_memory_nor_work(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(FileError), counted() as steps:
        read_tensors(tmp_path / "x.bin", allow_pickle=True)
    assert steps.calls < 50_000  # a log record and its handlers are some 1,000; what is hostile asks for 2**60


def test_a_file_that_shrinks_while_it_is_read_is_an_error_not_a_crash(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({f"t{i}": torch.ones(1 << 16) for i in range(4)}, path)
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(FileError, match="shrank"):
            file.read_all()
        with pytest.raises(FileError, match="shrank"):
            file.read("t3")


def test_tensors_outlive_their_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"t": torch.ones(1 << 20)}, path)
    _, tensors = read_tensors(path)
    os.truncate(path, 100)
    assert float(tensors["t"].sum()) == 1 << 20


def test_a_file_is_what_safetensors_writes_but_for_the_order_of_its_metadata(tmp_path):
    tensors = {
        "b": torch.ones(3, dtype=torch.float16),
        "a": torch.ones(2, 2, dtype=torch.float16).T,
        "naïve \x1f\n": torch.tensor(2.0),
        "none": torch.empty(0, 4, dtype=torch.float64),
    }
    ours = write_tensors(tmp_path / "ours.safetensors", tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()
    keys = [f"k{i}" for i in range(40)]
    forwards, backwards = (
        write_tensors(tmp_path / f"{i}.safetensors", tensors, dict.fromkeys(order, "v")).read_bytes()
        for i, order in enumerate((keys, keys[::-1]))
    )
    assert forwards == backwards
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", **dict.fromkeys(keys, "v")}
    with pytest.raises(FileError, match="cast it first"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2, dtype=torch.complex128)})
    assert not (tmp_path / "x.safetensors").exists()


def test_a_failed_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fail():
        with writing(path) as part:
            part.write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    assert path.read_text() == "old"


def test_writing_makes_parents_and_whole_folders(tmp_path):
    with writing(tmp_path / "a" / "b") as part:
        part.mkdir()
        (part / "c").write_text("1")
    assert (tmp_path / "a" / "b" / "c").read_text() == "1"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    with pytest.raises(FileError, match="folder that exists"), writing(tmp_path / "a"):
        pass


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot be written"):
        write_tensors(tmp_path / "file" / "x.safetensors", {"a": torch.ones(1)})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    def fill():
        with writing(tmp_path / "x") as part:
            part.touch()
            Path("/dev/full").write_text("x")

    with pytest.raises(FileError, match="No space left"):
        fill()
    assert list(tmp_path.iterdir()) == []


def tensors_of(value):
    return {f"t{i}": torch.full((1 << 10,), value) for i in range(3)}


def write_and_die(path, moment, rename):
    """Whether a writer in another process finished before it died."""

    def write():
        Path.replace = rename
        tensors = tensors_of(2.0)
        die_at(moment)
        write_tensors(path, tensors)

    code = ends_with(in_child(write))
    assert code in (0, 9)
    return code == 0


def kill_at_every_moment(path, rename):
    """What lies at ``path`` after each kill: the one value that all its tensors have, or ``None`` of a broken file."""
    values, finished = [], False
    while not finished:
        write_tensors(path, tensors_of(1.0))
        finished = write_and_die(path, len(values), rename)
        try:
            tensors = read_tensors(path)[1]
            (value,) = {float(number) for tensor in tensors.values() for number in tensor.unique()}
            values.append(value if len(tensors) == 3 else None)
        except (FileError, ValueError):
            values.append(None)
    return values


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path):
    values = kill_at_every_moment(tmp_path / "x.safetensors", Path.replace)
    turn = values.index(2.0)
    assert len(values) > 20
    assert values == [1.0] * turn + [2.0] * (len(values) - turn)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_kills_catch_a_writer_that_copies_where_it_should_rename(tmp_path):
    assert None in kill_at_every_moment(tmp_path / "x.safetensors", shutil.copyfile)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_reader_beside_a_busy_writer_sees_whole_files_only(tmp_path):
    path = tmp_path / "x.safetensors"
    contents = [{f"t{i}": torch.full((1 << 18,), value) for i in range(4)} for value in (1.0, 2.0)]
    write_tensors(path, contents[0])

    def write_on():
        for tensors in itertools.cycle(contents):
            write_tensors(path, tensors)

    writer = in_child(write_on)
    try:
        seen = []
        while len(seen) < 30 or (len(set(seen)) < 2 and len(seen) < 5000):
            tensors = load(path.read_bytes())  # of a mapped file that is cut, reading would end this process
            (value,) = {float(number) for tensor in tensors.values() for number in tensor.unique()}
            assert len(tensors) == 4
            seen.append(value)
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert set(seen) == {1.0, 2.0}
    assert len(read_tensors(path)[1]) == 4
