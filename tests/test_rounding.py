import pytest
import torch

from texforce_hub.adapter import Adapter, LowRank, Vector
from texforce_hub.errors import MergeError
from texforce_hub.merge.rounding import measure_fold, round_stochastically
from texforce_hub.shapes.models import make_text_encoder, make_tokenizer

NAME = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def problem(size):
    generator = torch.Generator().manual_seed(0)
    weight = 0.03 * torch.randn(256, 256, generator=generator)
    down, up = torch.randn(16, 256, generator=generator), torch.randn(256, 16, generator=generator)
    return Adapter({NAME: LowRank(down, up, size / 4)}), {f"{NAME}.weight": weight}


@pytest.mark.parametrize(
    ("size", "dtype", "low", "high"),
    [(1e-4, torch.bfloat16, 0.35, 0.55), (1e-3, torch.bfloat16, 0.03, 0.08), (1e-4, torch.float16, 0.04, 0.09)],
)
def test_a_small_change_loses_what_was_measured_for_it(size, dtype, low, high):
    adapter, base = problem(size)
    fold = measure_fold(adapter, base, dtype=dtype)
    assert low < fold.loss < high
    assert fold.layers[NAME] == pytest.approx(fold.loss)
    assert measure_fold(adapter, base, dtype=torch.float32).loss < 1e-3


def test_stochastic_rounding_is_right_on_average_and_gives_neighbours_only():
    values = torch.full((20_000,), 1.0 + 0.3 * 2**-7)
    rounded = round_stochastically(values, torch.bfloat16, torch.Generator().manual_seed(1)).double()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float((rounded - 1).mean() * 2**7) == pytest.approx(0.3, abs=0.02)
    exact = torch.tensor([0.0, 1.0, -2.5, 65504.0])
    assert torch.equal(round_stochastically(exact, torch.float16, torch.Generator()).float(), exact)


def test_stochastic_rounding_keeps_a_change_that_rounding_to_nearest_drops():
    adapter = Adapter({NAME: LowRank(torch.full((1, 200), 1e-3), torch.ones(200, 1))})
    base = {NAME: torch.ones(200, 200)}
    assert measure_fold(adapter, base, dtype=torch.bfloat16).loss == 1.0
    generator = torch.Generator().manual_seed(0)
    folded = round_stochastically(base[NAME] + adapter.delta(NAME), torch.bfloat16, generator)
    assert float(folded.double().mean()) - 1 == pytest.approx(1e-3, rel=0.1)


def test_draws_repeat_and_vectors_and_misfits_are_handled():
    adapter, base = problem(1e-4)
    one, other = (measure_fold(adapter, base, dtype=torch.bfloat16, stochastic=True, seed=3) for _ in range(2))
    assert one.loss == other.loss
    assert one.loss != measure_fold(adapter, base, dtype=torch.bfloat16, stochastic=True, seed=4).loss
    bias = Adapter({f"{NAME}.bias": Vector(torch.ones(4))})
    assert measure_fold(bias, {f"{NAME}.bias": torch.zeros(4)}).loss == 0.0
    with pytest.raises(MergeError, match="the base has"):
        measure_fold(adapter, {NAME: torch.zeros(3, 3)})


def test_a_live_model_is_a_base_and_its_biases_are_found():
    encoder = make_text_encoder(make_tokenizer())
    adapter = Adapter(
        {NAME: LowRank(torch.ones(1, 96), torch.ones(96, 1), 1e-5), f"{NAME}.bias": Vector(torch.ones(96))}
    )
    fold = measure_fold(adapter, encoder, dtype=torch.bfloat16)
    assert set(fold.layers) == {NAME, f"{NAME}.bias"}
    assert fold.layers[NAME] > 0.3
