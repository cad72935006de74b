"""A file is opened once, however much is read of it, and let go of when nobody uses it any more."""

import gc
import os
from pathlib import Path

import pytest
import torch

from tests.support.opens import counted_opens
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.errors import FileError
from texforce_hub.files.opened import OpenFile
from texforce_hub.files.tensors import TensorFile, read_tensors, stream_tensors
from texforce_hub.files.writing import write_tensors
from texforce_hub.hub.inspect import inspect_file
from texforce_hub.hub.read import open_adapter, read_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.merge import merge_adapters


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1")


@pytest.fixture
def path(pipe, tmp_path):
    return write_adapter(random_adapter(pipe), tmp_path / "a.safetensors")


def open_descriptors(path):
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    return sum(link.is_symlink() and os.readlink(link) == str(path) for link in links)  # noqa: PTH115


def test_reading_an_adapter_opens_its_file_once(path):
    with counted_opens() as opens:
        assert len(read_adapter(path).layers) > 4
    assert opens[path] == 1


def test_reading_a_pickle_opens_it_once(path):
    torch.save(read_tensors(path)[1], path.with_suffix(".bin"))
    with counted_opens() as opens:
        assert len(read_adapter(path.with_suffix(".bin")).layers) > 4
    assert opens[path.with_suffix(".bin")] == 1


def test_every_shard_is_opened_once(path):
    header, tensors = read_tensors(path)
    names = sorted(tensors)
    shards = [path.with_name(f"adapter_model-0000{i}-of-00002.safetensors") for i in (1, 2)]
    for shard, some in zip(shards, (names[::2], names[1::2]), strict=True):
        write_tensors(shard, {name: tensors[name] for name in some}, header.metadata)
    with counted_opens() as opens:
        assert read_adapter(shards[0]).layers.keys() == read_adapter(path).layers.keys()
    assert [opens[shard] for shard in shards] == [1, 1]


def test_an_adapter_that_stays_in_its_file_is_read_from_one_opening(path):
    with counted_opens() as opens:
        lazy = open_adapter(path)
        for _ in range(2):
            assert [lazy.layers[name].rank for name in lazy.layers]
    assert opens[path] == 1


def test_applying_an_adapter_opens_its_file_once(pipe, path):
    with counted_opens() as opens, apply_adapter(pipe, path):
        pass
    assert opens[path] == 1


def test_applying_an_adapter_reads_its_tensors_in_one_pass(pipe, path, monkeypatch):
    reads, read = [], OpenFile.read_into

    def count(self, target, offset):
        reads.append(len(target))
        return read(self, target, offset)

    monkeypatch.setattr(OpenFile, "read_into", count)
    with apply_adapter(pipe, path):
        pass
    tensors = read_tensors(path)[1].values()
    assert reads[:-1] == [sum(tensor.nbytes for tensor in tensors)]  # the last are this test's own


def test_a_merge_opens_each_source_for_its_tensors_and_for_its_hash(pipe, path):
    other = write_adapter(random_adapter(pipe, seed=2), path.with_name("b.safetensors"))
    with counted_opens() as opens:
        merge_adapters([(path, 0.5), (other, 0.5)], "svd")
    assert {opens[path], opens[other]} == {2}


def test_inspecting_a_file_opens_it_for_its_kind_its_header_and_its_hash(path):
    with counted_opens() as opens:
        assert inspect_file(path).error is None
    assert opens[path] == 3


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed by Linux")
def test_a_file_is_let_go_of_when_nobody_uses_it(path):
    read_adapter(path)
    assert open_descriptors(path) == 0
    lazy = open_adapter(path)
    layers = lazy.layers
    assert open_descriptors(path) == 1
    del lazy
    assert layers[next(iter(layers))].rank is not None
    del layers
    gc.collect()
    assert open_descriptors(path) == 0
    with TensorFile(path) as file:
        tensors = file.tensors
    assert open_descriptors(path) == 0
    with pytest.raises(ValueError, match="closed file"):
        tensors[next(iter(tensors))]
    path.write_bytes(b"{}")
    with pytest.raises(FileError):
        TensorFile(path)
    assert open_descriptors(path) == 0


def test_what_is_read_at_once_is_what_is_read_one_by_one(tmp_path):
    tensors = {f"t{i}": torch.randn(i, 3).to(d) for i, d in enumerate((torch.float64, torch.float16, torch.bfloat16))}
    path = write_tensors(tmp_path / "x.safetensors", {**tensors, "odd": torch.ones(3, dtype=torch.uint8)})
    text = path.read_bytes()
    # A foreign writer: bytes first, so that the others begin where no number of their size may lie in memory.
    shuffled = tmp_path / "shuffled.safetensors"
    shuffled.write_bytes(_with_bytes_first(text))
    for file in (path, shuffled):
        with TensorFile(file) as opened:
            whole = opened.read_all()
            assert {name: tensor.dtype for name, tensor in whole.items()} == {
                name: tensor.dtype for name, tensor in {**tensors, "odd": torch.ones(3, dtype=torch.uint8)}.items()
            }
            for name, tensor in whole.items():
                assert torch.equal(tensor, opened.read(name))
                assert torch.equal(tensor, {**tensors, "odd": torch.ones(3, dtype=torch.uint8)}[name])


def _with_bytes_first(content):
    """The same tensors, the bytes of ``odd`` before all others."""
    import json

    length = int.from_bytes(content[:8], "little")
    entries, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = entries.pop("__metadata__")
    blocks = {name: data[slice(*entry["data_offsets"])] for name, entry in entries.items()}
    position = 0
    for name in ("odd", *(name for name in entries if name != "odd")):
        entries[name]["data_offsets"] = [position, position + len(blocks[name])]
        position += len(blocks[name])
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    joined = b"".join(blocks[name] for name in ("odd", *(name for name in blocks if name != "odd")))
    return len(text).to_bytes(8, "little") + text + joined


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_read_a_tensor_at_a_time_as_torch_reads_it(tmp_path, zipped):
    storage = torch.arange(40.0)
    content = {
        "turned": storage[4:16].view(3, 4).t(),
        "spread": storage[3:4].expand(2, 3),
        "steps": storage[1::7],
        "whole": torch.randn(2, 3, dtype=torch.float16),
        "none": torch.empty(0, 3),
        "number": torch.tensor(2.5, dtype=torch.bfloat16),
        **({"fp8": torch.ones(3).to(torch.float8_e5m2)} if zipped else {}),  # torch reads none from the older stream
    }
    path = tmp_path / "x.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = torch.load(path, weights_only=True)
    header, stream = stream_tensors(path, allow_pickle=True)
    assert list(stream) == list(loaded)
    assert header.scalars == {"number": 2.5}
    for name, tensor in stream.items():
        assert tensor.is_contiguous()
        assert (tensor.dtype, tensor.shape) == (loaded[name].dtype, loaded[name].shape)
        assert torch.equal(tensor.float(), loaded[name].float())
