"""A dtype by its name, wherever a public function takes one."""

import pytest
import torch
from safetensors import safe_open

import texforce_hub
from tests.support.pipelines_saved import original_topology
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.errors import ConfigError
from texforce_hub.pipelines.repair import repair_pipeline

ADAPTER = "shapes-colour"


def stored(path):
    with safe_open(path, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  # it is no mapping
    return {tensor.dtype for tensor in tensors if tensor.dim() > 1}


def dtypes(adapter):
    return {tensor.dtype for layer in adapter.layers.values() for tensor in layer.tensors()}


@pytest.mark.parametrize("name", ["float16", "fp16", "half", "torch.float16", torch.float16])
def test_an_adapter_is_cast_to_a_dtype_by_its_name(name):
    assert dtypes(texforce_hub.read_adapter(ADAPTER).to(dtype=name)) == {torch.float16}


def test_merging_resizing_and_extracting_take_a_dtypes_name():
    pipe, tuned = tiny_pipeline("sd1"), tiny_pipeline("sd1", seed=1)
    adapter = random_adapter(pipe)
    results = [
        texforce_hub.merge_adapters([(adapter, 1.0)], rank=2, dtype="float16"),
        texforce_hub.resize_adapter(adapter, rank=1, dtype="fp16"),
        texforce_hub.extract_adapter(tuned, pipe, rank=1, dtype="half"),
    ]
    assert [dtypes(result.adapter) for result in results] == [{torch.float16}] * 3


def test_files_are_written_in_a_dtype_by_its_name(tmp_path):
    adapter = texforce_hub.write_adapter(
        texforce_hub.read_adapter(ADAPTER), tmp_path / "a.safetensors", dtype="bfloat16"
    )
    assert stored(adapter) == {torch.bfloat16}
    checkpoint = texforce_hub.save_checkpoint(original_topology("sd1"), tmp_path / "b.safetensors", dtype="float16")
    assert stored(checkpoint) == {torch.float16}


def test_a_fold_is_measured_in_a_dtype_by_its_name():
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe)
    named = texforce_hub.measure_fold(adapter, pipe, dtype="bf16")
    assert named == texforce_hub.measure_fold(adapter, pipe, dtype=torch.bfloat16)


CALLS = {
    "to": lambda adapter, pipe, folder: adapter.to(dtype="float17"),
    "merge": lambda adapter, pipe, folder: texforce_hub.merge_adapters([(adapter, 1.0)], dtype="float17"),
    "resize": lambda adapter, pipe, folder: texforce_hub.resize_adapter(adapter, rank=1, dtype="float17"),
    "extract": lambda adapter, pipe, folder: texforce_hub.extract_adapter(pipe, pipe, rank=1, dtype="float17"),
    "write": lambda adapter, pipe, folder: texforce_hub.write_adapter(adapter, folder / "a", dtype="float17"),
    "checkpoint": lambda adapter, pipe, folder: texforce_hub.save_checkpoint(pipe, folder / "b", dtype="float17"),
    "fold": lambda adapter, pipe, folder: texforce_hub.measure_fold(adapter, pipe, dtype="float17"),
    "repair": lambda adapter, pipe, folder: repair_pipeline(folder, dtype="float17"),
    "load": lambda adapter, pipe, folder: texforce_hub.load_pipeline("shapes", dtype="float17"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_dtype_that_does_not_exist_is_refused_before_anything_is_done(name, tmp_path):
    pipe = tiny_pipeline("sd1")
    with pytest.raises(ConfigError, match="no dtype 'float17'; expected one of float32"):
        CALLS[name](random_adapter(pipe), pipe, tmp_path)
    assert list(tmp_path.iterdir()) == []
