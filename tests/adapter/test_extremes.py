"""Layers of several dtypes at once, and of values whose products are beyond every number: right, or one line."""

from itertools import product
from typing import Any

import pytest
import torch

from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import AdapterError
from texforce_hub.formats.codec.encoding import encode
from texforce_hub.hub.measure import measure_layers
from texforce_hub.merge.compare import compare_adapters
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.resize import resize_adapter

LAYER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
KINDS: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "LowRank": (LowRank, ((2, 8), (8, 2))),
    "Hadamard": (Hadamard, ((8, 2), (2, 8), (8, 2), (2, 8))),
    "Kronecker": (Kronecker, ((2, 2), (4, 4))),
    "Kronecker in factors": (lambda left, up, down: Kronecker(left, up=up, down=down), ((2, 2), (4, 1), (1, 4))),
}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.float8_e5m2)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtypes", list(product(DTYPES, repeat=2)), ids=lambda pair: "-".join(map(str, pair)))
def test_a_layer_of_two_dtypes_is_what_it_is_in_the_wider_one(name, dtypes):
    make, shapes = KINDS[name]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtypes[i % 2]) for i, shape in enumerate(shapes)]
    mixed = Adapter({LAYER: make(*tensors)})
    double = Adapter({LAYER: make(*(tensor.double() for tensor in tensors))})
    torch.testing.assert_close(mixed.delta(LAYER).double(), double.delta(LAYER), rtol=1e-5, atol=1e-6)
    assert compare_adapters(mixed, double).cosine == pytest.approx(1.0)
    assert resize_adapter(mixed, rank=1).kept == pytest.approx(resize_adapter(double, rank=1).kept, rel=1e-4)
    assert list(measure_layers(mixed.layers.items()))
    for method in ("svd", "ties"):
        merged = merge_adapters([(mixed, 0.5), (double, 0.5)], method)
        assert torch.isfinite(merged.adapter.delta(LAYER)).all()
    for dialect in ("diffusers", "kohya", "peft"):
        if name == "LowRank" or dialect != "diffusers":
            assert encode(mixed, dialect).tensors


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [3e38, 1e30, 1e-40])
def test_values_whose_products_are_beyond_every_number_are_one_line_or_right(name, size):
    make, shapes = KINDS[name]
    generator = torch.Generator().manual_seed(0)
    adapter = Adapter({LAYER: make(*(torch.randn(shape, generator=generator).sign() * size for shape in shapes))})
    works = (
        lambda: compare_adapters(adapter, adapter),
        lambda: resize_adapter(adapter, rank=1),
        lambda: merge_adapters([(adapter, 0.5), (adapter, 0.5)], "svd"),
        lambda: list(measure_layers(adapter.layers.items())),
    )
    for work in works:
        try:
            work()
        except AdapterError as error:
            assert "overflow" in str(error) or "NaN or infinity" in str(error)  # noqa: PT017
