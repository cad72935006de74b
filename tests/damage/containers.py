"""Damages of the container: bytes, headers, claims, and things that are no file at all."""

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from tests.damage.files import Random, change_entry, join, pick, split
from tests.damage.registry import DAMAGES, Damage, damages
from texforce_hub.errors import FileError, RefError
from texforce_hub.files.opened import OpenFile


@damages("cut anywhere", FileError, r"truncated|bytes long|is empty")
def _(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


@damages("emptied", FileError, "is empty")
def _(path, rng):
    os.truncate(path, 0)


@damages("a header longer than the file", FileError, "truncated: a header of")
def _(path, rng):
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", len(content) + rng.randint(1, 9999)) + content[8:])


@damages("a header of exabytes", FileError, "claim a header of")
def _(path, rng):
    path.write_bytes(struct.pack("<Q", rng.randint(10**9, 2**63)) + path.read_bytes()[8:])


@damages("a header of no bytes", FileError, "bytes long")
def _(path, rng):
    path.write_bytes(struct.pack("<Q", rng.randint(0, 1)) + path.read_bytes()[8:])


@damages("a flipped bit in the header", FileError, "not UTF-8|not JSON")
def _(path, rng):
    content = bytearray(path.read_bytes())
    content[8 + rng.randrange(struct.unpack("<Q", content[:8])[0])] ^= 0x80
    path.write_bytes(bytes(content))


@damages("a header that is nested without end", FileError, "not JSON")
def _(path, rng):
    join(path, b'{"a":' * rng.randint(50_000, 200_000), b"")


@damages("a header that is a list", FileError, "expected an object|not JSON")
def _(path, rng):
    join(path, rng.choice([b"[]", b"[{}]", b"null", b'"text"']), b"")


@damages("a name twice", FileError, "in the header twice")
def _(path, rng):
    entries, data = split(path)
    key = pick(entries, rng)
    text = json.dumps(entries)[:-1] + f", {json.dumps(key)}: {json.dumps(entries[key])}}}"
    join(path, text.encode(), data)


@damages("overlapping tensors", FileError, "overlaps|needs|bytes unused")
def _(path, rng):
    entries, data = split(path)
    first = pick(entries, rng)
    second = rng.choice([key for key in sorted(entries) if key not in (first, "__metadata__")])
    entries[first]["data_offsets"] = entries[second]["data_offsets"]
    join(path, entries, data)


@damages("a hole between tensors", FileError, "bytes unused|overlaps|truncated")
def _(path, rng):
    entries, data = split(path)
    begin, end = entries[key := pick(entries, rng)]["data_offsets"]
    shift = rng.randint(1, 64)
    entries[key]["data_offsets"] = [begin + shift, end + shift]
    join(path, entries, data)


@damages("trailing bytes", FileError, "bytes follow its last tensor")
def _(path, rng):
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 100)))


@damages("an unknown dtype", FileError, "unknown dtype")
def _(path, rng):
    change_entry(path, rng, dtype=rng.choice(["F31", "", "f32", None, 7, "F" * 9999]))


@damages("a dtype of another width", FileError, "needs")
def _(path, rng):
    change_entry(path, rng, dtype=rng.choice(["F64", "U8"]))


@damages("a rank of a million", FileError, "needs")
def _(path, rng):
    change_entry(path, rng, shape=[10**6, rng.choice([16, 32, 10**6])])


@damages("a shape that overflows", FileError, "expected at most 8 dimensions below")
def _(path, rng):
    change_entry(path, rng, shape=[2**62, 2**62, rng.randint(2, 9)])


@damages("a shape of thousands of digits", FileError, "expected at most 8 dimensions below")
def _(path, rng):
    change_entry(path, rng, shape=[rng.randint(0, 1), *[10**4000] * rng.randint(1, 3)])


@damages("offsets of thousands of digits", FileError, "data_offsets")
def _(path, rng):
    change_entry(path, rng, data_offsets=rng.choice([[0, 10**4000], [10**4000, 10**4000]]))


@damages("dimensions that torch cannot hold", FileError, "expected at most 8 dimensions below|no machine can address")
def _(path, rng):
    shape = rng.choice([[1] * 70, [0, 2**62], [0, 2**64], [0, 2**30, 2**30, 2**30], [0] * 9])
    entries, data = split(path)
    size = 4 if 0 not in shape else 0
    added = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + size]}
    join(path, entries | {rng.choice(["<word>", f"{pick(entries, rng)}.x"]): added}, data + bytes(size))


@damages("half a character", FileError, "no Unicode text")
def _(path, rng):
    entries, data = split(path)
    half = rng.choice(["\ud800", "a\udcff", "\udfff\ud800"])
    added = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    entries |= rng.choice([{f"bundle_emb.{half}": added}, {"__metadata__": {half: ""}}, {"__metadata__": {"a": half}}])
    join(path, entries, data)


@damages("tens of thousands of tensors", FileError, "expected at most 20000, no adapter has as many")
def _(path, rng):
    entries, data = split(path)
    nothing = {"dtype": "F32", "shape": [0, 2], "data_offsets": [len(data)] * 2}
    stem = rng.choice(["unknown.{}", "lora_te_text_model_encoder_layers_{}_self_attn_q_proj.lora_down.weight"])
    join(path, entries | {stem.format(i): nothing for i in range(1000, 22_000)}, data)


@damages("a shape that is no shape", FileError, "has shape")
def _(path, rng):
    change_entry(path, rng, shape=rng.choice([[-4, 16], [1.5, 2], "16", None, [True, 2], [[4]]]))


@damages("offsets that go backwards", FileError, "data_offsets")
def _(path, rng):
    change_entry(path, rng, data_offsets=rng.choice([[64, 0], [-64, 0], [0], [0, 2**70], ["a", "b"]]))


@damages("an entry that lacks something", FileError, "lacks a dtype")
def _(path, rng):
    entries, data = split(path)
    del entries[pick(entries, rng)][rng.choice(["dtype", "shape", "data_offsets"])]
    join(path, entries, data)


@damages("metadata that is no text", FileError, "expected a string|expected an object")
def _(path, rng):
    entries, data = split(path)
    entries["__metadata__"] = rng.choice([{"a": 1}, {"a": None}, {"a": {"b": "c"}}, [], "text"])
    join(path, entries, data)


@damages("a folder", RefError, "holds no adapter file")
def _(path, rng):
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("nothing here")


@damages("a link to nowhere", FileError, "cannot be read")
def _(path, rng):
    path.unlink()
    path.symlink_to(rng.choice(["nowhere", path.name, "../../../no/such/place"]))


@damages("a pipe", FileError, "a pipe")
def _(path, rng):
    path.unlink()
    os.mkfifo(path)


@damages("a page of HTML", FileError, "failed download")
def _(path, rng):
    path.write_text(rng.choice(["<!DOCTYPE html>\n<html>", "<html><body>404", "<?xml version='1.0'?>"]))


@damages("a git-lfs pointer", FileError, "git lfs pull")
def _(path, rng):
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{rng.getrandbits(256):064x}\nsize 9\n")


@contextmanager
def shrinking() -> Iterator[None]:
    """Every file that is opened for its tensors loses half of its bytes once its size has been asked for."""
    measure = OpenFile._state

    def measure_and_cut(file: OpenFile) -> tuple[int, int]:
        state = measure(file)
        os.truncate(file.path, state[0] // 2)
        return state

    with patch.object(OpenFile, "_state", measure_and_cut):
        yield


def leave_whole(path: Path, rng: Random) -> None:
    """Nothing is wrong yet."""


DAMAGES["shrinks while it is read"] = Damage(
    "shrinks", leave_whole, FileError, "shrank|changed while", ".safetensors", shrinking
)
