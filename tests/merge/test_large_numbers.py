"""Numbers at the end of float32 and beyond, halves of two dtypes: a finite result or one line, never infinity."""

import pytest
import torch

from tests.support.merging import Q0, A, B, distance
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter, Layer
from texforce_hub.errors import AdapterError, MergeError
from texforce_hub.merge.compare import compare_adapters
from texforce_hub.merge.extract import extract_adapter
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.methods.registry import METHODS
from texforce_hub.merge.resize import resize_adapter

FAR = torch.full((96, 2), 1e20)
HUGE: dict[str, Layer] = {
    "LoRA": LowRank(torch.full((2, 96), 3e38), torch.full((96, 2), 3e38)),
    "LoHa": Hadamard(FAR, FAR.T, FAR, FAR.T),
    "dense": Dense(torch.full((96, 96), 3e38)),
}
TUNED, BASE = {"unet.a.weight": torch.ones(4, 4)}, {"unet.a.weight": torch.zeros(4, 4)}
CALLS = {
    "merge": lambda huge: merge_adapters([(huge, 2.0), (A, 1.0)]),
    "resize": lambda huge: resize_adapter(huge, rank=1),
    "compare": lambda huge: compare_adapters(huge, A),
}


def is_finite(adapter):
    return all(torch.isfinite(tensor).all() for layer in adapter.layers.values() for tensor in layer.tensors())


def outcome(call):
    """``finite``, ``not finite``, or what the error says."""
    try:
        result = call()
    except AdapterError as error:
        return str(error)
    return "finite" if is_finite(getattr(result, "adapter", A)) else "not finite"


@pytest.mark.parametrize("layer", HUGE.values(), ids=HUGE.keys())
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_huge_numbers_give_a_finite_result_or_one_line(layer, call):
    said = outcome(lambda: call(Adapter({Q0: layer})))
    assert said == "finite" or ("too large to compute with" in said and "\n" not in said)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_that_numbers_are_too_large(method):
    said = outcome(lambda: merge_adapters([(Adapter({Q0: HUGE["LoRA"]}), 1.0), (A, 1.0)], method))
    assert said == "finite" or "too large to compute with" in said


@pytest.mark.parametrize(
    "call",
    [
        lambda: merge_adapters([(A, 10**400)]),
        lambda: merge_adapters([(A, 1e300)]),
        lambda: merge_adapters([(A, 1e300)], "cat"),
        lambda: merge_adapters([(A, 1e300)], part_weights={"text_encoder": 1e300}),
        lambda: merge_adapters([(A, 1.0)], part_weights={"text_encoder": 10**400}),
        lambda: merge_adapters([(A, 1.0)], rank=10**400),
        lambda: merge_adapters([(Adapter({f"{Q0}.bias": Vector(torch.full((96,), 3e38))}), 2.0)]),
        lambda: resize_adapter(A, ratio=10**400),
        lambda: resize_adapter(A, energy=10**400),
        lambda: extract_adapter(
            {"unet.a.weight": torch.ones(4, 4)}, {"unet.a.weight": torch.zeros(4, 4)}, rank=10**400
        ),
        lambda: extract_adapter(
            {"unet.a.bias": torch.full((4,), 3e38)}, {"unet.a.bias": torch.full((4,), -3e38)}, rank=1, rest=True
        ),
        lambda: extract_adapter(TUNED, BASE, rank=1, threshold=float("nan")),
    ],
)
def test_numbers_beyond_every_range_are_one_line(call):
    with pytest.raises((AdapterError, MergeError)) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("method", METHODS)
def test_halves_of_two_dtypes_are_merged_as_those_of_one(method):
    mixed = LowRank(A.layers[Q0].down.double(), A.layers[Q0].up, A.layers[Q0].scale)
    sources = [(Adapter({Q0: layer}), 1.0) for layer in (mixed, A.layers[Q0])]
    results = [merge_adapters([source, (B, 0.5)], method).adapter for source in sources]
    assert results[0].layers.keys() == results[1].layers.keys()
    for name in results[0].layers:
        assert distance(results[0].delta(name), results[1].delta(name)) < 1e-4


def test_every_kind_of_layer_takes_halves_of_two_dtypes():
    g = torch.Generator().manual_seed(0)

    def half(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=g).to(dtype)

    layers = [
        LowRank(half(2, 6, dtype=torch.float64), half(4, 2)),
        Hadamard(half(4, 2), half(2, 6, dtype=torch.float64), half(4, 2), half(2, 6)),
        Kronecker(half(2, 2), up=half(2, 1), down=half(1, 3, dtype=torch.float64)),
        Kronecker(half(2, 2, dtype=torch.float64), right=half(2, 3)),
    ]
    for layer in layers:
        wanted = layer.map(lambda tensor: tensor.double()).delta()
        assert distance(layer.delta(), wanted) < 1e-6
        expanded = layer.low_rank() if isinstance(layer, Hadamard | Kronecker) else None
        if expanded is not None:
            assert distance(expanded.delta(), wanted) < 1e-6
