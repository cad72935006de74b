"""Headers are read without torch, and nothing in them is believed."""

import json
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from texforce_hub.errors import FileError
from texforce_hub.files.container import open_header, sniff
from texforce_hub.files.header import TensorInfo, parse_header


def test_names_shapes_dtypes_metadata_and_scalars_are_read(tmp_path):
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "a.alpha": torch.tensor(8.0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"k": "v"})
    header = open_header(tmp_path / "x.safetensors")
    assert dict(header.tensors) == {
        "a": TensorInfo((2, 3), "F32"),
        "b": TensorInfo((4,), "BF16"),
        "a.alpha": TensorInfo((), "F32"),
    }
    assert (dict(header.metadata), dict(header.scalars), header.config) == ({"k": "v"}, {"a.alpha": 8.0}, None)


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


@settings(deadline=None, max_examples=60)
@given(st.floats(-400, 400), st.sampled_from([*FLOATS, torch.int32, torch.int64]))
def test_a_scalar_reads_as_torch_reads_it(tmp_path_factory, value, dtype):
    path = tmp_path_factory.mktemp("scalar") / "x.safetensors"
    tensor = torch.tensor(value).to(dtype)
    save_file({"alpha": tensor}, path)
    torch.testing.assert_close(open_header(path).scalars["alpha"], float(tensor), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickles_header_is_what_torch_loads(tmp_path, zipped):
    linear = torch.nn.Linear(3, 2)
    content = {**linear.state_dict(), "w.alpha": torch.tensor(4.0, dtype=torch.float16), "t": torch.ones(4, 2).t()}
    torch.save({"state_dict": content, "step": 3}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    header = open_header(tmp_path / "x.bin")
    assert {name: info.shape for name, info in header.tensors.items()} == {
        n: tuple(t.shape) for n, t in content.items()
    }
    assert (dict(header.scalars), dict(header.metadata)) == ({"w.alpha": 4.0}, {"step": "3"})


def test_the_peft_config_beside_a_file_comes_with_its_header(tmp_path):
    save_file({"a": torch.ones(1, 2)}, tmp_path / "adapter_model.safetensors")
    save_file({"a": torch.ones(1, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    assert dict(open_header(tmp_path / "adapter_model.safetensors").config or {}) == {"r": 4}
    assert open_header(tmp_path / "pytorch_lora_weights.safetensors").config is None
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(FileError, match="expected an object"):
        open_header(tmp_path / "adapter_model.safetensors")


def raw(entries, data=b""):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"", "is empty"),
        (b"abc", "3 bytes long"),
        (struct.pack("<Q", 1 << 60), "claim a header"),
        (struct.pack("<Q", 0), "0 bytes long"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (raw(b"{]"), "not JSON"),
        (raw(b"[1]"), "expected an object"),
        (raw(b"\xff\xfe\xfd"), "not UTF-8"),
        (raw(b"[" * 100_000), "not JSON"),
        (raw({"a": ONE}, b"123"), "truncated"),
        (raw({"a": ONE}, b"12345"), "1 bytes follow"),
        (raw({"a": ONE, "b": ONE}, b"1234"), "overlaps"),
        (raw({"a": {**ONE, "data_offsets": [2, 6]}}, b"123456"), "2 bytes unused"),
        (raw({"a": {**ONE, "shape": [1 << 40, 1 << 40]}}, b"1234"), "at most 8 dimensions"),
        (raw({"a": {**ONE, "shape": [-1]}}, b"1234"), "has shape"),
        (raw({"a": {**ONE, "shape": [True]}}, b"1234"), "has shape"),
        (raw({"a": {**ONE, "dtype": "F31"}}, b"1234"), "unknown dtype 'F31'"),
        (raw({"a": {"dtype": "F32"}}), "lacks"),
        (raw({"__metadata__": {"k": 1}}), "expected a string"),
        (raw({"__metadata__": []}), "expected an object"),
        (raw(b'{"a":' + json.dumps(ONE).encode() + b',"a":' + json.dumps(ONE).encode() + b"}", b"1234"), "'a' is in"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, content, phrase):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=phrase) as error:
        open_header(path)
    assert "\n" not in str(error.value)


def test_the_header_is_readable_through_byte_ranges(tmp_path):
    save_file({"a": torch.ones(2), "a.alpha": torch.tensor(2.0)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    header = parse_header(lambda at, length: content[at : at + length], len(content), name="remote")
    assert header.scalars == {"a.alpha": 2.0}


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"<!DOCTYPE html>", "failed download"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"GGUF....", "GGUF"),
        (b"hello there", "neither a safetensors file nor a torch pickle"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, phrase):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(FileError, match=phrase):
        sniff(tmp_path / "x.bin")


def test_folders_pipes_and_nothing_are_refused(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for path, phrase in ((tmp_path, "is a folder"), (tmp_path / "pipe", "a pipe"), (tmp_path / "no", "No such file")):
        with pytest.raises(FileError, match=phrase):
            open_header(path)
    with pytest.raises(FileError, match="cannot be read"):
        open_header("a\0b")


def test_headers_are_read_without_torch(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    code = (
        "import sys; from texforce_hub.files.container import open_header; "
        f"print(len(open_header({str(tmp_path / 'x.bin')!r}).tensors), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "False"]
