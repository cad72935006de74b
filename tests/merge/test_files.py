"""Merging from files: what is read of them, and how often."""

from collections import Counter

import pytest
import torch

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.files.tensors import TensorFile
from texforce_hub.hub.read import open_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.resize import resize_adapter


def adapter(seed, rank=4):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            f"text_encoder.text_model.encoder.layers.{n}.self_attn.{kind}_proj": LowRank(
                torch.randn(rank, 24, generator=generator), torch.randn(24, rank, generator=generator), 0.5
            )
            for n in range(3)
            for kind in ("q", "v")
        }
    )


@pytest.fixture
def files(tmp_path):
    return [str(write_adapter(adapter(n), tmp_path / f"{n}.safetensors", dialect="kohya")) for n in range(3)]


@pytest.fixture
def reads(monkeypatch):
    """How often each tensor of each file is read."""
    counted, read = Counter(), TensorFile.read

    def count(file, name):
        counted[file._file.path.name, name] += 1
        return read(file, name)

    monkeypatch.setattr(TensorFile, "read", count)
    return counted


@pytest.mark.parametrize("options", [{"rank": 3}, {"energy": 0.9}, {"method": "cat"}, {"method": "slerp", "rank": 2}])
def test_a_merge_reads_every_tensor_once(files, reads, options):
    sources = files[:2] if options.get("method") == "slerp" else files
    merge_adapters([(path, 0.5) for path in sources], **options)
    halves = {key: count for key, count in reads.items() if not key[1].endswith("alpha")}
    assert len(halves) == len(sources) * 6 * 2
    assert set(reads.values()) == {1}


def test_resizing_reads_every_tensor_once(files, reads):
    resize_adapter(open_adapter(files[0]), rank=2)
    assert len(reads) >= 6 * 2
    assert set(reads.values()) == {1}


def test_a_file_given_twice_counts_as_often_as_it_is_given(files):
    twice = merge_adapters([(files[0], 0.5), (files[1], 0.5), (files[0], 0.25)], rank=8)
    once = merge_adapters([(files[0], 0.75), (files[1], 0.5)], rank=8)
    assert twice.report.cosines[0][2] == pytest.approx(1.0)
    for name, layer in once.adapter.layers.items():
        torch.testing.assert_close(twice.adapter.layers[name].delta(), layer.delta(), rtol=1e-5, atol=1e-5)
