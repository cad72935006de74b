"""The kinds of layers and their tensors: seen without a copy of the layer."""

import math

import pytest
import torch

from texforce_hub.adapter.batches import count_numbers
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.finite import is_finite
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank

T = torch.zeros
LAYERS = {
    "LoRA": (LowRank(T(2, 5), T(4, 2)), 18),
    "dense": (Dense(T(4, 5)), 20),
    "vector": (Vector(T(7)), 7),
    "LoHa": (Hadamard(T(4, 2), T(2, 5), T(4, 3), T(3, 5)), 45),
    "LoKr in full": (Kronecker(T(2, 2), right=T(2, 3)), 10),
    "LoKr in factors": (Kronecker(T(2, 2), up=T(2, 1), down=T(1, 3)), 9),
    "DoRA": (Decomposed(LowRank(T(2, 5), T(4, 2)), torch.ones(4)), 22),
}


@pytest.mark.parametrize(("layer", "numbers"), LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_shows_the_tensors_that_map_changes(layer, numbers):
    passed = []

    def note(tensor):
        passed.append(tensor)
        return tensor

    layer.map(note)
    shown = list(layer.tensors())
    assert {id(tensor) for tensor in shown} == {id(tensor) for tensor in passed}
    assert len(shown) == len(passed)
    assert count_numbers(layer) == numbers


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_one_broken_number_anywhere_makes_a_layer_not_finite(broken, dtype):
    for layer, _ in LAYERS.values():
        for index, tensor in enumerate(layer.map(lambda t: t.to(dtype)).tensors()):
            assert is_finite(layer.map(lambda t: t.to(dtype)))
            damaged = tensor.float().clone()
            damaged.view(-1)[-1] = broken
            tensors = iter([damaged.to(dtype) if i == index else t for i, t in enumerate(layer.tensors())])
            order = {id(t): next(tensors) for t in layer.tensors()}
            assert not is_finite(layer.map(lambda t, new=order: new[id(t)].to(dtype)))


def test_a_scale_that_is_not_finite_makes_a_layer_not_finite():
    assert not is_finite(LowRank(T(2, 5), T(4, 2), scale=math.inf))
    assert is_finite(LowRank(T(0, 5), T(4, 0)))
