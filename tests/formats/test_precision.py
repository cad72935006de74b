"""What a narrow dtype loses of a layer, found without looking at every number where a bound will do."""

import pytest
import torch

from texforce_hub.formats.codec import precision
from texforce_hub.formats.codec.precision import _most_underflow, _round, _underflow, fit_dtype

DTYPES = (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def parts(down_size, up_size, factor, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(4, 60, generator=generator), torch.randn(50, 4, generator=generator)
    ranks = 10.0 ** -torch.arange(4.0)
    return [("down", (down * down_size * ranks[:, None]).to(dtype), 1.0), ("up", (up * up_size).to(dtype), factor)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1.0, 1.0), (1e-3, 1.0), (1e-6, 1e-2), (1e-2, 1e-7), (1e-9, 1.0)], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.5, -0.3, 2**-9])
def test_the_bound_is_never_below_what_is_lost(dtype, sizes, factor):
    down, up = sizes
    given = parts(down, up, factor)
    stored = _round(given, dtype, "layer")
    assert _most_underflow(given, stored) >= _underflow(given, stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_dtypes_as_fine_as_the_sums_themselves_there_is_no_bound(dtype):
    given = parts(1.0, 1.0, 0.5)
    assert _most_underflow(given, _round(given, dtype, "layer")) == float("inf")


def test_an_ordinary_layer_is_not_looked_at_number_by_number(monkeypatch):
    looked = []

    def note(*_):
        looked.append(1)
        return 0.0

    monkeypatch.setattr(precision, "_underflow", note)
    assert len(dict(fit_dtype(parts(0.1, 0.1, 0.3, torch.float16), None, "layer"))) == 2
    assert looked == []
    dict(fit_dtype(parts(1e-5, 1e-5, 1.0), torch.float16, "layer"))
    assert looked == [1]


def test_eight_bits_are_measured_as_well():
    given = [(role, tensor.to(torch.float8_e4m3fn), factor) for role, tensor, factor in parts(1.0, 1.0, 0.5)]
    assert _most_underflow(given, _round(given, None, "layer")) > 0
