"""The writer refuses, in one line and with nothing left, what its reader would refuse."""

import pytest
import torch

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import AdapterError, DialectError, FileError
from texforce_hub.files.writing import write_tensors
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter

Q = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
WRITTEN = ("diffusers", "kohya", "peft")


def low_rank(down=None, scale=1.0):
    return LowRank(torch.ones(2, 8) if down is None else down, torch.ones(8, 2), scale)


def refused(tmp_path, adapter, error, words, dialect="diffusers", name="x", **options):
    path = tmp_path / name if dialect == "peft" else tmp_path / f"{name}.safetensors"
    with pytest.raises(error, match=words) as found:
        write_adapter(adapter, path, dialect=dialect, **options)
    assert "\n" not in str(found.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dialect", WRITTEN)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_not_written(tmp_path, dialect, number):
    refused(tmp_path, Adapter({Q: low_rank(torch.full((2, 8), number))}), AdapterError, "NaN or infinity", dialect)
    refused(tmp_path, Adapter({Q: low_rank(scale=number)}), AdapterError, "NaN or infinity", dialect)


@pytest.mark.parametrize("dialect", WRITTEN)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e8m0fnu])
def test_a_dtype_of_no_layer_is_refused_by_name(tmp_path, dialect, dtype):
    words = f"cannot be written as {dtype}; expected one of float64, float32, float16"
    refused(tmp_path, Adapter({Q: low_rank()}), AdapterError, words, dialect, dtype=dtype)


@pytest.mark.parametrize("metadata", [{"a": 3}, {3: "a"}, {"a": None}])
def test_metadata_that_is_no_text_is_refused(tmp_path, metadata):
    with pytest.raises(AdapterError, match="expected text as key and as value"):
        Adapter({Q: low_rank()}, metadata)
    with pytest.raises(FileError, match="expected text as key and as value"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dialect", ["diffusers", "peft"])
@pytest.mark.parametrize("path", ["foo bar\x1b.q", "a" * 2000])
def test_a_layer_name_that_no_layout_has_is_refused(tmp_path, dialect, path):
    words = "could not be read again" if dialect == "diffusers" else "no reader could tell"
    refused(tmp_path, Adapter({f"text_encoder.{path}": low_rank()}), DialectError, words, dialect)


@pytest.mark.parametrize("dialect", WRITTEN)
def test_a_null_character_in_a_path_is_refused(tmp_path, dialect):
    refused(tmp_path, Adapter({Q: low_rank()}), FileError, "null character", dialect, name="a\0b")


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.CKPT"])
def test_a_pickle_s_name_gets_no_folder(tmp_path, name):
    with pytest.raises(FileError, match=r"pickles are not written; name a \.safetensors file"):
        write_adapter(Adapter({Q: low_rank()}), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / name).mkdir()  # whoever has such a folder may write into it
    assert write_adapter(Adapter({Q: low_rank()}), tmp_path / name).parent == tmp_path / name


@pytest.mark.parametrize("alpha", ["3", float("nan"), [1.0]])
def test_an_alpha_that_is_no_number_is_refused(tmp_path, alpha):
    path = write_adapter(Adapter({Q: low_rank()}), tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=r"alpha .*; expected a finite number"):
        read_adapter(path, alpha=alpha)


def test_an_old_file_stays_where_a_new_one_is_refused(tmp_path):
    path = write_adapter(Adapter({Q: low_rank()}), tmp_path / "x.safetensors")
    before = path.read_bytes()
    with pytest.raises(DialectError, match="could not be read again"):
        write_adapter(Adapter({"text_encoder.odd\x1b": low_rank()}), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
