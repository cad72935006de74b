"""Norms and effective ranks come from the factors, are those of the whole change, and never cost more than they."""

import pytest
import torch

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Layer
from texforce_hub.errors import AdapterError
from texforce_hub.hub import measure as weights
from texforce_hub.hub.measure import measure_layers


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LAYERS: dict[str, Layer] = {
    "low rank": LowRank(randn(3, 12), randn(20, 3), -0.5),
    "LoHa": Hadamard(randn(20, 2), randn(2, 12), randn(20, 3), randn(3, 12), 0.7),
    "LoHa of a high rank": Hadamard(randn(20, 6), randn(6, 12), randn(20, 5), randn(5, 12), 0.7),
    "LoHa on a kernel": Hadamard(randn(8, 2), randn(2, 4, 3, 3), randn(8, 2), randn(2, 4, 3, 3)),
    "LoKr": Kronecker(randn(4, 3), right=randn(5, 6), scale=-2.0),
    "LoKr in factors": Kronecker(randn(4, 3), up=randn(5, 2), down=randn(2, 6), scale=0.3),
    "LoKr on a kernel": Kronecker(randn(2, 4), right=randn(3, 2, 3, 3)),
    "LoKr in factors on a kernel": Kronecker(randn(2, 4), up=randn(3, 2), down=randn(2, 2, 3, 3), scale=0.3),
    "LoKr of one row and one column": Kronecker(randn(1, 9), right=randn(9, 1)),
    "DoRA": Decomposed(LowRank(randn(3, 12), randn(20, 3)), randn(20)),
    "DoRA of a LoKr": Decomposed(Kronecker(randn(4, 3), right=randn(5, 6)), randn(20)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_numbers_are_those_of_the_whole_change(kind):
    layer = LAYERS[kind]
    change = (layer.inner if isinstance(layer, Decomposed) else layer).delta().double().flatten(1)
    (facts,) = measure_layers([("layer", layer)])
    shares = torch.linalg.svdvals(change)
    shares = shares[shares > 1e-6 * shares[0]] / shares[shares > 1e-6 * shares[0]].sum()
    assert facts.norm == pytest.approx(float(change.norm()), rel=1e-5)
    assert facts.effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-3)


@pytest.mark.parametrize("kind", [kind for kind, layer in LAYERS.items() if isinstance(layer, Kronecker)])
def test_a_kronecker_product_is_never_multiplied_out(monkeypatch, kind):
    def refuse(_):
        raise AssertionError("it was")

    monkeypatch.setattr(Kronecker, "delta", refuse)
    monkeypatch.setattr(Kronecker, "low_rank", refuse)
    assert len(list(measure_layers([("layer", LAYERS[kind])]))) == 1


def test_a_change_too_large_for_what_it_is_stored_as_is_named(monkeypatch):
    monkeypatch.setattr(weights, "_MOST_NUMBERS", 100)
    with pytest.raises(AdapterError, match="too large to measure"):
        list(measure_layers([("layer", LAYERS["LoHa of a high rank"])]))
