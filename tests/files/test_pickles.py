"""A pickle shows us what it shows torch, or is refused; tensors are built from what was checked."""

import pickle
import struct
import zlib
from collections import OrderedDict

import pytest
import torch

from texforce_hub.errors import FileError
from texforce_hub.files.container import open_header
from texforce_hub.files.tensors import read_tensors


def text(word):
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def group(*items):
    return b"(" + b"".join(items) + b"t"


def tensor(key):
    storage = group(text("storage"), b"ctorch\nFloatStorage\n", text(key), text("cpu"), b"K\x04") + b"Q"
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n"
        + group(storage, b"K\x00", b"K\x04\x85", b"K\x01\x85", b"\x89", hooks)
        + b"R"
    )


def program(**tensors):
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in tensors.items()) + b"u."


SHOWN = program(shown=tensor("0"))
HIDDEN = program(hidden=tensor("0"))
VERSION = (b"archive/version", b"3\n")
DATA = (b"archive/data/0", struct.pack("<4f", 1, 2, 3, 4))


def write_zip(path, entries):
    """A zip archive whose entries may have any names; a name of two is spelled differently in front and at the end."""
    body = table = b""
    for names, content in entries:
        front, end = names if isinstance(names, tuple) else (names, names)
        offset, crc, size = len(body), zlib.crc32(content), len(content)
        common = struct.pack("<HHHHIII", 0, 0, 0, 0x21, crc, size, size)
        body += b"PK\x03\x04" + struct.pack("<H", 20) + common + struct.pack("<HH", len(front), 0) + front + content
        table += (
            b"PK\x01\x02"
            + struct.pack("<HH", 20, 20)
            + common
            + struct.pack("<HHHHHII", len(end), 0, 0, 0, 0, 0, offset)
            + end
        )
    count = len(entries)
    path.write_bytes(
        body + table + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, len(table), len(body), 0)
    )
    return path


def test_a_plain_archive_is_read(tmp_path):
    path = write_zip(tmp_path / "x.bin", [(b"archive/data.pkl", SHOWN), DATA, VERSION])
    assert read_tensors(path, allow_pickle=True)[1]["shown"].tolist() == [1, 2, 3, 4]
    assert torch.load(path, weights_only=True)["shown"].tolist() == [1, 2, 3, 4]


TWO_FACED = {
    "a name cut at a null character": [(b"archive/data.pkl\0", SHOWN), (b"archive/Data.pkl", HIDDEN), DATA],
    "names that differ in case": [(b"archive/data.pkl", SHOWN), (b"archive/DATA.PKL", HIDDEN), DATA],
    "two folders": [(b"archive/data.pkl", SHOWN), (b"other/data.pkl", HIDDEN), DATA],
    "a folder of another case": [(b"Archive/data.pkl", SHOWN), (b"archive/data.pkl", HIDDEN), DATA],
    "one name twice": [(b"archive/data.pkl", SHOWN), (b"archive/data.pkl", HIDDEN), DATA],
    "no folder beside one": [(b"data.pkl", SHOWN), (b"archive/data.pkl", HIDDEN), DATA],
    "another name in front": [((b"archive/data.pkk", b"archive/data.pkl"), SHOWN), DATA],
    "a storage under another name in front": [(b"archive/data.pkl", SHOWN), ((b"archive/data/1", DATA[0]), DATA[1])],
    "a control character": [(b"archive/data.pkl", SHOWN), (b"archive/data.pkl\x1b", HIDDEN), DATA],
}


@pytest.mark.parametrize("entries", TWO_FACED.values(), ids=list(TWO_FACED))
def test_an_archive_that_shows_readers_different_contents_is_refused(tmp_path, entries):
    path = write_zip(tmp_path / "x.bin", entries)
    for read in (open_header, lambda file: read_tensors(file, allow_pickle=True)):
        with pytest.raises(FileError) as caught:
            read(path)
        assert str(caught.value).isprintable()


DEEP = b")" + b"2\x86" * 60
REBUILDING = {
    "a dictionary of marks with a key that is hashed for ever": b"\x80\x02(" + DEEP + b"K\x01d.",
    "a key that is hashed for ever": b"\x80\x02}" + DEEP + b"K\x01s.",
    "an ordered dictionary whose get is replaced": b"\x80\x02ccollections\nOrderedDict\n)R(" + b"}(" + text("get")
    + b"ctorch\nFloatStorage\nud" + b".",
    "a state set on what is no dictionary": b"\x80\x02](}b.",
    "items set on a list": b"\x80\x02]K\x00K\x01s.",
}  # fmt: skip


@pytest.mark.parametrize("program", REBUILDING.values(), ids=list(REBUILDING))
def test_what_would_hash_for_ever_or_replace_a_method_is_refused_before_anything_is_built(tmp_path, program):
    with pytest.raises(FileError):
        open_header(write_zip(tmp_path / "x.bin", [(b"archive/data.pkl", program), DATA]))


def test_a_state_that_hides_a_dictionary_s_methods_is_left_out(tmp_path):
    hiding = b"\x80\x02ccollections\nOrderedDict\n)R" + text("shown") + tensor("0") + b"s"
    hiding += b"}" + text("get") + b"ctorch\nFloatStorage\nsb."
    path = write_zip(tmp_path / "x.bin", [(b"archive/data.pkl", hiding), DATA])
    assert list(open_header(path).tensors) == ["shown"]


def test_a_module_s_state_dict_with_its_versions_is_read(tmp_path):
    state = torch.nn.Linear(2, 3).state_dict()
    assert isinstance(state, OrderedDict)
    assert "_metadata" in vars(state)
    torch.save(state, tmp_path / "x.pt")
    assert b"_metadata" in (tmp_path / "x.pt").read_bytes()
    header, tensors = read_tensors(tmp_path / "x.pt", allow_pickle=True)
    assert dict(header.metadata) == {}
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())


def test_nothing_of_torch_s_unpickler_is_used(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "x.bin", [(b"archive/data.pkl", SHOWN), DATA])

    def refuse(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    assert read_tensors(path, allow_pickle=True)[1]["shown"].tolist() == [1, 2, 3, 4]
