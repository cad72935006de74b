"""A stack on a pipeline: ``W + Σ wᵢ·ΔWᵢ``, seen by the pipeline's own calls, undone bit for bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.applying import bits, gold_outputs, gold_outputs_of, same_bits, shared_pipeline, text_outputs
from tests.support.pipelines_tiny import FAMILIES, random_adapter, tiny_pipeline
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.matching import Matched, Unmatched
from texforce_hub.errors import AdapterError, ConfigError, MatchError
from texforce_hub.families import live_name


@pytest.mark.parametrize("mode", ["attach", "fuse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_dense_sum_and_comes_back_to_the_bit(family, mode):
    pipe = shared_pipeline(family)
    before, plain = bits(pipe), text_outputs(pipe)
    stack = [(random_adapter(pipe, seed=1, rank=3), 0.7), (random_adapter(pipe, seed=2, rank=5, scale=0.5), -0.4)]
    gold = gold_outputs(pipe, stack)
    with apply_adapter(pipe, stack, mode=mode) as applied:
        for output, expected, base in zip(text_outputs(pipe), gold, plain, strict=True):
            assert torch.allclose(output, expected, atol=1e-5)
            assert not torch.allclose(output, base, atol=1e-3)
        assert all(isinstance(d, Matched) for of in applied.decisions.values() for d in of.values())
    assert same_bits(pipe, before)
    for output, base in zip(text_outputs(pipe), plain, strict=True):
        assert torch.equal(output, base)


@pytest.mark.parametrize("mode", ["attach", "fuse"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_stack_of_n_rides_as_one_pair(count, mode):
    pipe = shared_pipeline("sd1")
    before = bits(pipe)
    stack = [(random_adapter(pipe, seed=i, rank=1 + i % 4), 0.3 - 0.2 * (i % 3)) for i in range(count)]
    gold = gold_outputs(pipe, stack)[0]
    with apply_adapter(pipe, stack, mode=mode):
        assert torch.allclose(text_outputs(pipe)[0], gold, atol=1e-5)
        extra = sum(t.numel() for n, t in pipe.text_encoder.state_dict().items() if "lora_" in n)
        ranks = sum(1 + i % 4 for i in range(count))
        sizes = [sum(layer.shape) for layer in stack[0][0].layers.values()]
        assert extra == (ranks * sum(sizes) if mode == "attach" else 0)
    assert same_bits(pipe, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["attach", "fuse"])
def test_half_precision_comes_back_to_the_bit(mode, dtype):
    pipe = tiny_pipeline("sd1").to(dtype=dtype)
    before = bits(pipe)
    with apply_adapter(pipe, [(random_adapter(pipe, seed=1), 1.0), (random_adapter(pipe, seed=2), 0.5)], mode=mode):
        assert text_outputs(pipe)[0].dtype == dtype
        if mode == "fuse":
            assert not same_bits(pipe, before)
    assert same_bits(pipe, before)


def mixed_adapter(pipe):
    names = list(random_adapter(pipe).layers)
    torch.manual_seed(5)
    low = LowRank(torch.randn(2, 32) * 0.1, torch.randn(32, 2))
    halves: Any = [torch.randn(shape) * 0.4 for shape in ((32, 2), (2, 32), (32, 2), (2, 32))]
    layers: dict[str, Any] = {
        names[0]: Dense(torch.randn(32, 32) * 0.1),
        names[1]: Decomposed(low, torch.rand(32) + 0.5),
        names[2]: Hadamard(*halves),
        names[3]: low,
        names[0] + ".bias": Vector(torch.randn(32) * 0.1),
    }
    return Adapter(layers)


@pytest.mark.parametrize("mode", ["attach", "fuse"])
def test_changes_that_are_not_low_rank_are_written_in_and_say_so(mode):
    pipe = shared_pipeline("sd1")
    before = bits(pipe)
    adapter = mixed_adapter(pipe)
    bias = next(n for n in adapter.layers if n.endswith(".bias"))
    dense = Adapter({n: layer for n, layer in adapter.layers.items() if n != bias})
    module = pipe.text_encoder.get_submodule(live_name(bias.partition(".")[2].removesuffix(".bias"), False))
    with torch.no_grad():
        old = module.bias.clone()
        module.bias += 0.5 * adapter.layers[bias].delta()
    gold = gold_outputs(pipe, [(dense, 0.5)])[0]
    module.bias.data.copy_(old)
    with apply_adapter(pipe, adapter, weight=0.5, mode=mode) as applied:
        assert torch.allclose(text_outputs(pipe)[0], gold, atol=1e-5)
        decisions: Any = applied.decisions["adapter"]
        hows = [d.how for d in decisions.values()]
        assert hows.count("written") == (4 if mode == "attach" else 5)
        if mode == "attach":
            assert sum("not low rank" in d.note for d in decisions.values()) == 4
    assert same_bits(pipe, before)


def test_weights_by_part_block_and_pattern():
    pipe = shared_pipeline("sdxl")
    adapter = random_adapter(pipe)
    block = "text_encoder.text_model.encoder.layers.1"
    weights = {"text_encoder": 0.5, block: 0.2, "text_encoder_2": 0.0, "text_encoder_2*fc1": -1.0}

    def wanted(name):
        if name.startswith("text_encoder_2"):
            return -1.0 if name.endswith("fc1") else 0.0
        return 0.2 if name.startswith(block) else 0.5

    expected = Adapter({n: layer.scaled(wanted(n)) for n, layer in adapter.layers.items()})
    gold = gold_outputs(pipe, [(expected, 1.0)])
    for mode in ("attach", "fuse"):
        with apply_adapter(pipe, [(adapter, weights)], mode=mode):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(text_outputs(pipe), gold, strict=True))
    with pytest.raises(ConfigError, match=r"no layer is covered by 'layers\.77'"):
        apply_adapter(pipe, [(adapter, {"layers.77": 1.0})])


@pytest.mark.parametrize("mode", ["attach", "fuse"])
def test_weights_change_without_reading_again(mode):
    pipe = shared_pipeline("sd1")
    before = bits(pipe)
    a, b = random_adapter(pipe, seed=1), random_adapter(pipe, seed=2)
    with apply_adapter(pipe, [a, b], mode=mode) as applied:
        applied.set_weights([0.2, -0.6])
        assert torch.allclose(text_outputs(pipe)[0], gold_outputs_of(before, pipe, [(a, 0.2), (b, -0.6)]), atol=1e-5)
        applied.set_weights({"adapter-2": 0.0})
        assert torch.allclose(text_outputs(pipe)[0], gold_outputs_of(before, pipe, [(a, 0.2)]), atol=1e-5)
        with pytest.raises(ConfigError, match="no adapter 'c'"):
            applied.set_weights({"c": 1.0})
        with pytest.raises(ConfigError, match="1 weights for a stack of 2"):
            applied.set_weights([1.0])
    assert same_bits(pipe, before)
    with pytest.raises(MatchError, match="no longer"):
        applied.set_weights([1.0, 1.0])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_new_weights_after_a_change_of_dtype_keep_the_layers_own_scale(dtypes):
    pipe = tiny_pipeline("sd1").to(dtype=dtypes[0])
    layers = random_adapter(pipe).layers
    adapter = Adapter({name: replace(layer, scale=3.0) for name, layer in layers.items()})
    with apply_adapter(pipe, adapter) as applied:
        pipe.to(dtype=dtypes[1])
        applied.set_weights([0.5])
        for decided in applied.decisions.values():
            for name, matched in decided.items():
                change = getattr(pipe, matched.part).get_submodule(matched.path).get_delta_weight(applied.name)
                assert torch.allclose(change.float(), 0.5 * layers[name].delta() * 3.0, rtol=0.1, atol=1e-2), name


def test_what_does_not_fit_is_refused_in_one_sentence_and_nothing_changes():
    pipe, other = shared_pipeline("sd1"), shared_pipeline("sd2")
    before = bits(pipe)
    with pytest.raises(MatchError, match=r"\(48, 48\).*\(32, 32\).*nothing was changed"):
        apply_adapter(pipe, random_adapter(other))
    adapter = random_adapter(pipe)
    name = next(iter(adapter.layers))
    deeper = Adapter({**adapter.layers, name.replace("layers.0", "layers.7"): adapter.layers[name]})
    with pytest.raises(MatchError, match=r"layers\.7.*strict=False"):
        apply_adapter(pipe, deeper)
    with apply_adapter(pipe, deeper, strict=False) as applied:
        assert sum(isinstance(d, Unmatched) for d in applied.decisions["adapter"].values()) == 1
    broken = Adapter({name: LowRank(torch.full((1, 32), torch.nan), torch.ones(32, 1))})
    with pytest.raises(AdapterError, match="NaN"):
        apply_adapter(pipe, broken)
    with pytest.raises(ConfigError, match="finite"):
        apply_adapter(pipe, adapter, weight=float("inf"))
    with pytest.raises(ConfigError, match="empty"):
        apply_adapter(pipe, [])
    with pytest.raises(ConfigError, match="mode"):
        apply_adapter(pipe, adapter, mode="glue")  # type: ignore[arg-type]
    assert same_bits(pipe, before)


def test_a_part_that_only_fits_elsewhere_goes_there_and_says_so():
    pipe = shared_pipeline("flux")
    own = random_adapter(pipe, parts=["text_encoder_2"])
    renamed = Adapter({n.replace("text_encoder_2", "text_encoder_3"): layer for n, layer in own.layers.items()})
    gold = gold_outputs(pipe, [(own, 1.0)])
    with apply_adapter(pipe, renamed) as applied:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(text_outputs(pipe), gold))
        decisions: Any = applied.decisions["adapter"]
        assert {d.note for d in decisions.values()} == {"named text_encoder_3 in the adapter, fits only text_encoder_2"}


@pytest.mark.parametrize("mode", ["attach", "fuse"])
def test_a_layer_of_no_rank_is_put_on_and_changes_nothing(mode):
    pipe = shared_pipeline("sd1")
    before = text_outputs(pipe)[0]
    name, layer = next(iter(random_adapter(pipe).layers.items()))
    nothing = Adapter({name: LowRank(torch.zeros(0, layer.shape[1]), torch.zeros(layer.shape[0], 0))})
    with apply_adapter(pipe, nothing, mode=mode) as applied:
        assert torch.equal(text_outputs(pipe)[0], before)
        applied.set_weights([0.5])
        assert torch.equal(text_outputs(pipe)[0], before)
    assert torch.equal(text_outputs(pipe)[0], before)
