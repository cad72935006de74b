"""Large files go by a few layers at a time: the same bytes, the same errors, and memory that does not grow."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.keys import LISTINGS, listing, random_tensors
from texforce_hub.adapter.dense import Vector
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import DialectError, FileError, TexForceHubError
from texforce_hub.files.tensors import TensorFile, read_tensors, stream_tensors
from texforce_hub.files.writing import write_stream, write_tensors
from texforce_hub.formats.codec.encoding import encode, encode_lazily
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.measure import measure_file, measure_layers
from texforce_hub.hub.read import open_adapter, read_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.compare import compare_adapters
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.replay import verify_merge
from texforce_hub.merge.resize import resize_adapter

NAMES = [f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj" for i in range(4)]
WRITABLE = ("diffusers", "kohya", "peft")


def some_adapter(dtype=torch.float16, rank=3):
    torch.manual_seed(0)
    return Adapter({n: LowRank(torch.randn(rank, 8).to(dtype), torch.randn(8, rank).to(dtype), 0.7) for n in NAMES})


def test_tensors_are_read_one_by_one_as_all_at_once(tmp_path):
    path = write_tensors(tmp_path / "x.safetensors", {f"t{i}": torch.randn(i, 3) for i in range(5)})
    header, whole = read_tensors(path)
    again, stream = stream_tensors(path)
    assert (again, list(stream), len(stream)) == (header, list(whole), 5)
    assert all(torch.equal(stream[name], tensor) for name, tensor in whole.items())
    assert stream["t2"] is not stream["t2"]
    assert "t9" not in stream
    with pytest.raises(KeyError):
        stream["t9"]


def test_tensors_that_come_in_any_order_make_the_same_file(tmp_path):
    tensors = {f"t{i}": torch.randn(i, 2).to(d) for i, d in enumerate((torch.float64, torch.float16, torch.float32))}
    outline = {name: tensor.to("meta") for name, tensor in tensors.items()}
    one = write_tensors(tmp_path / "one.safetensors", tensors, {"k": "v"})
    other = write_stream(tmp_path / "other.safetensors", outline, reversed(tensors.items()), {"k": "v"})
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("came", "phrase"),
    [
        ({}, "never came"),
        ({"a": torch.ones(3)}, r"came as \(3,\)"),
        ({"a": torch.ones(2, dtype=torch.float16)}, "expected .2,. of torch.float32"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, "expected nothing"),
    ],
)
def test_tensors_that_were_not_announced_write_nothing(tmp_path, came, phrase):
    with pytest.raises(FileError, match=phrase):
        write_stream(tmp_path / "new" / "x.safetensors", {"a": torch.ones(2)}, came.items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dialect", WRITABLE)
def test_an_adapter_is_encoded_from_its_file_as_from_memory(tmp_path, dialect, dtype):
    source = write_adapter(some_adapter(), tmp_path / "x.safetensors", dialect="kohya")
    whole = encode(read_adapter(source), dialect, dtype=dtype)
    outline, stream = encode_lazily(open_adapter(source), dialect, dtype=dtype)
    tensors = dict(stream)
    assert (outline.metadata, outline.config, outline.filename) == (whole.metadata, whole.config, whole.filename)
    assert tensors.keys() == whole.tensors.keys() == outline.tensors.keys()
    for key, tensor in whole.tensors.items():
        assert (outline.tensors[key].shape, outline.tensors[key].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(tensors[key], tensor)


@pytest.mark.parametrize(
    "name", [name for name in LISTINGS if name.startswith(("lycoris", "mixed")) and name.endswith("sd1")]
)
def test_every_kind_converts_from_its_file_to_the_bytes_it_has_in_memory(tmp_path, name):
    header = listing(name)
    some = {key: info for key, info in header.tensors.items() if "layers_0" in key or "mid_block" in key}
    tensors = {key: tensor.half() for key, tensor in random_tensors(replace(header, tensors=some)).items()}
    source = write_tensors(tmp_path / "x.safetensors", tensors, header.metadata)
    whole = write_adapter(read_adapter(source), tmp_path / "whole.safetensors", dialect="kohya")
    stream = convert_adapter(source, tmp_path / "stream.safetensors", dialect="kohya")
    assert stream.read_bytes() == whole.read_bytes()


def test_what_is_wrong_with_a_file_is_said_as_ever_and_nothing_is_written(tmp_path):
    good = dict(encode(some_adapter(torch.float32), "kohya").tensors)
    down = next(key for key in good if key.endswith("lora_down.weight"))
    twin = {key.replace("lora_te_", "lora_te1_"): tensor + 1 for key, tensor in good.items()}
    dense = {"lora_te_text_model_encoder_layers_0_mlp_fc1.diff": torch.ones(6, 8)}
    dense_twin = {key.replace("lora_te_", "lora_te1_"): tensor + 1 for key, tensor in dense.items()}
    broken = {
        "dense-twins": ({**dense, **dense_twin}, DialectError, "is there twice, with unequal values"),
        "nan": ({**good, down: good[down] * torch.nan}, TexForceHubError, "NaN or infinity in 1 of 4 layers"),
        "twins": ({**good, **twin}, DialectError, "is there twice, with unequal values"),
    }
    for name, (tensors, error, phrase) in broken.items():
        source = write_tensors(tmp_path / f"{name}.safetensors", tensors)
        with pytest.raises(error, match=phrase) as whole:
            read_adapter(source)
        with pytest.raises(error, match=phrase) as stored:
            convert_adapter(source, tmp_path / "out" / "y.safetensors", dialect="kohya")
        assert str(stored.value) == str(whole.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("work", ["convert", "merge", "resize", "verify"])
def test_every_tensor_of_a_file_is_read_once(tmp_path, monkeypatch, work):
    paths = [str(write_adapter(some_adapter(), tmp_path / f"{i}.safetensors")) for i in range(2)]
    merged = str(write_adapter(merge_adapters(paths).adapter, tmp_path / "merged.safetensors"))
    reads = Counter()
    read = TensorFile.read

    def count(self, name):
        reads[self._file.path, name] += 1
        return read(self, name)

    monkeypatch.setattr(TensorFile, "read", count)
    if work == "convert":
        convert_adapter(paths[0], tmp_path / "out.safetensors", dialect="kohya")
    elif work == "merge":
        merge_adapters(paths, rank=2)
    elif work == "resize":
        resize_adapter(open_adapter(paths[0]), rank=1)
    else:
        assert verify_merge(merged).same
    assert set(reads.values()) == {1}


@pytest.mark.parametrize("change", ["cut", "replaced"])
def test_a_file_that_changes_while_it_is_converted_is_one_error_and_no_output(tmp_path, change):
    source = write_adapter(some_adapter(), tmp_path / "x.safetensors")
    stored = open_adapter(source)
    if change == "cut":
        os.truncate(source, source.stat().st_size - 200)
    else:
        write_adapter(some_adapter().scaled(2.0), source)
    with pytest.raises(FileError, match=r"shrank|changed"):
        write_adapter(stored, tmp_path / "out" / "y.safetensors", dialect="kohya")
    assert not (tmp_path / "out").exists()


def test_numbers_are_measured_and_compared_from_the_file_as_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("texforce_hub.adapter.batches.TOGETHER", 60)  # two batches, not one
    one = write_adapter(some_adapter(), tmp_path / "one.safetensors", dialect="kohya")
    two = write_adapter(some_adapter(rank=2), tmp_path / "two.safetensors", dialect="kohya")
    whole = [read_adapter(path) for path in (one, two)]
    assert measure_file(one) == list(measure_layers(whole[0].layers.items()))
    assert compare_adapters(open_adapter(one), open_adapter(two)) == compare_adapters(*whole)


@pytest.mark.parametrize("limits", [{"rank": 2}, {"energy": 0.9}, {"max_total_rank": 6, "ratio": 50}])
def test_an_adapter_is_resized_from_its_file_as_in_memory(tmp_path, monkeypatch, limits):
    layers = {**some_adapter().layers, f"{NAMES[0]}.bias": Vector(torch.ones(8))}
    path = write_adapter(Adapter(layers), tmp_path / "a.safetensors", dialect="kohya")
    together = resize_adapter(read_adapter(path), **limits)
    monkeypatch.setattr("texforce_hub.adapter.batches.TOGETHER", 60)
    apart = resize_adapter(open_adapter(path), **limits)
    assert [fact.name for fact in apart.layers] == [fact.name for fact in together.layers]
    for one, other in zip(apart.layers, together.layers, strict=True):
        assert (one.before, one.after) == (other.before, other.after)
        assert (one.kept, one.norm) == pytest.approx((other.kept, other.norm), rel=1e-5)
    for name in layers:
        torch.testing.assert_close(apart.adapter.delta(name), together.adapter.delta(name))
    assert apart.adapter.metadata == together.adapter.metadata


@pytest.mark.parametrize("method", ["svd", "cat", "ties", "dare_ties", "slerp"])
@pytest.mark.parametrize("limits", [{}, {"rank": 2}, {"max_total_rank": 6}])
def test_adapters_are_merged_from_their_files_as_in_memory(tmp_path, monkeypatch, method, limits):
    if method == "cat" and limits:
        pytest.skip("the exact sum has no limit")
    vectors = {f"{NAMES[0]}.bias": Vector(torch.ones(8))}
    sources = [Adapter({**some_adapter(rank=rank).layers, **vectors}, extras={"emb": torch.ones(2)}) for rank in (2, 3)]
    paths = [
        write_adapter(adapter, tmp_path / f"{i}.safetensors", dialect="kohya") for i, adapter in enumerate(sources)
    ]
    together = merge_adapters([(read_adapter(path), 0.5) for path in paths], method, seed=3, **limits)
    monkeypatch.setattr("texforce_hub.adapter.batches.TOGETHER", 60)
    apart = merge_adapters([(str(path), 0.5) for path in paths], method, seed=3, **limits)
    assert list(apart.adapter.layers) == list(together.adapter.layers)
    assert apart.adapter.ranks == together.adapter.ranks
    for name in together.adapter.layers:
        torch.testing.assert_close(apart.adapter.delta(name), together.adapter.delta(name), rtol=1e-4, atol=1e-5)
    assert torch.equal(apart.adapter.extras["emb"], torch.ones(2))
    assert [(fact.name, fact.rank, fact.sources) for fact in apart.report.layers] == [
        (fact.name, fact.rank, fact.sources) for fact in together.report.layers
    ]


def test_an_adapter_of_vectors_has_no_ranks_to_spend():
    adapter = Adapter({f"{NAMES[0]}.bias": Vector(torch.ones(8))})
    assert resize_adapter(adapter, max_total_rank=4).kept == 1.0


MEASURED = """
import json, resource, sys
from pathlib import Path
import torch
from texforce_hub.merge.compare import compare_adapters
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.measure import measure_file
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.replay import verify_merge
from texforce_hub.merge.resize import resize_adapter
from texforce_hub.hub.read import open_adapter

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large, folder = map(Path, sys.argv[1:])
def work(path, out):
    measure_file(path)
    convert_adapter(path, f"{folder}/out/{out}.safetensors", dialect="kohya", dtype="bfloat16")
    compare_adapters(open_adapter(path), open_adapter(path))
    resize_adapter(open_adapter(path), rank=2)
    merge_adapters([(path, 0.5), (path, 0.25)], "svd", rank=2)
work(small, "small")
before = peak()
work(large, "large")
print(json.dumps(peak() - before))
"""


def wide_file(path, layers):
    """Layers of 1.6 MB each, all of one shape, without holding them."""
    names = [f"lora_unet_up_blocks_{b}_resnets_{r}_conv{c}" for b in range(4) for r in range(3) for c in (1, 2)]
    shapes = {".lora_down.weight": (32, 1280, 3, 3), ".lora_up.weight": (1280, 32, 1, 1)}
    outline = {n + end: torch.empty(s, device="meta") for n in names[:layers] for end, s in shapes.items()}
    values = {end: torch.randn(shape) for end, shape in shapes.items()}
    return write_stream(path, outline, ((key, values[key[key.index(".") :]]) for key in outline))


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux only")
def test_memory_stays_far_below_the_size_of_the_file(tmp_path):
    small, large = wide_file(tmp_path / "small.safetensors", 12), wide_file(tmp_path / "large.safetensors", 24)
    argv = [sys.executable, "-c", MEASURED, small, large, tmp_path]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back: the peak is what was held
    run = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=Path.cwd(), env=env)
    grown = json.loads(run.stdout.splitlines()[-1])
    assert grown < large.stat().st_size / 8
